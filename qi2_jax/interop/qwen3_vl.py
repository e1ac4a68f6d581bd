"""Names and configuration of the published condition encoder (`Qwen3VLForConditionalGeneration`)."""

import dataclasses

from qi2_jax.interop.tensor_names import NameMap
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig

CLASS = "Qwen3VLForConditionalGeneration"

NAMES = NameMap(
    renames=(
        ("model.visual.blocks.{}.", "visual.blocks."),
        ("model.visual.deepstack_merger_list.{}.", "visual.deepstack_merger_list."),
        ("model.language_model.layers.{}.", "language_model.layers."),
        ("model.", ""),
    ),
    passthrough=(r"model\.language_model\.norm\.weight", r"lm_head\.weight"),
)


def name_map(config: Qwen3VLConfig) -> NameMap:
    """The name map, with the final norm and the language head as passthrough tensors.

    They follow the hidden state that conditions the diffusion transformer. A model with tied embeddings has no head.
    """
    text = config.text
    shapes = {
        "model.language_model.norm.weight": (text.hidden_size,),
        "lm_head.weight": (text.vocab_size, text.hidden_size),
    }
    return dataclasses.replace(NAMES, passthrough_shapes=shapes, optional=("lm_head.weight",))
