"""The six stages of the Qwen-Image-2 curriculum."""
