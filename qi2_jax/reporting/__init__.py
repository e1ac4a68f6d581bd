"""The page of `qi2 report`, and grids of sample images."""
