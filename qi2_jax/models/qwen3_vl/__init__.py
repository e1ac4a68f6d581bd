"""The condition encoder of Qwen-Image-2.1: Qwen3-VL without its final norm and language head."""

from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from qi2_jax.models.qwen3_vl.inputs import EncoderInputs, VisionInputs, prepare_inputs
from qi2_jax.models.qwen3_vl.model import Qwen3VL

__all__ = [
    "EncoderInputs",
    "Qwen3VL",
    "Qwen3VLConfig",
    "TextConfig",
    "VisionConfig",
    "VisionInputs",
    "prepare_inputs",
]
