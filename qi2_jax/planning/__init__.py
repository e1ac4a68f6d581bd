"""What a training step will need, known before any TPU is rented: memory, arithmetic, and the time they imply."""
