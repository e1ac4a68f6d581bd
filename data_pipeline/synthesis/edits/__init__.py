"""Edit pairs made from images."""
