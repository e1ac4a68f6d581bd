"""Memory, FLOPs and step time of a training step, determined before any TPU is rented."""
