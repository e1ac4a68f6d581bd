"""Exchange with PyTorch: tensor names, safetensors files, diffusers and transformers folders."""
