"""Training the autoencoder on crops of images."""
