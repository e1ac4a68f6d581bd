"""The page of `qi2 report`, and sheets of sample images."""
