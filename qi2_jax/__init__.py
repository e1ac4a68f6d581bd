"""qi2: train the Qwen-Image-2 family with JAX on TPU."""
