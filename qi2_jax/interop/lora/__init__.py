"""LoRA adapters of the transformer: files in the formats of diffusers, peft, ComfyUI and kohya, and merging.

targets.py      the linear layers that a file can name, and where they are in our model
formats.py      how each format spells the name of a tensor
settings.py     peft's configuration: the scale of each layer's change
reading.py      from a file or folder to low-rank changes
merging.py      low-rank changes, added to weights as they are read
writing.py      from an adapter of ours to a file for `load_lora_weights`
"""
