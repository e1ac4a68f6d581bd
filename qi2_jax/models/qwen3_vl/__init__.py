"""The condition encoder of Qwen-Image-2.1: Qwen3-VL without its final norm and language head."""
