"""Training the transformer (MMDiT) on encoded samples."""
