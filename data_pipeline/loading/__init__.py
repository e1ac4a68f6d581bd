"""From encoded samples or images to training batches."""
