"""Names and configuration of the published condition encoder (`Qwen3VLForConditionalGeneration`)."""

import json
from pathlib import Path

from qi2_jax.interop.names import NameMap
from qi2_jax.models.qwen3_vl import Qwen3VLConfig

CLASS = "Qwen3VLForConditionalGeneration"

_MAX_CONFIG_BYTES = 1 << 20

NAMES = NameMap(
    renames=(
        ("model.visual.blocks.{}.", "visual.blocks."),
        ("model.visual.deepstack_merger_list.{}.", "visual.deepstack_merger_list."),
        ("model.language_model.layers.{}.", "language_model.layers."),
        ("model.", ""),
    ),
    # The final norm and the language head act after the hidden state that conditions the diffusion transformer.
    # A model with tied embeddings publishes no head.
    carried=(r"model\.language_model\.norm\.weight", r"lm_head\.weight"),
)


def read_config(folder: str | Path) -> Qwen3VLConfig:
    """Reads `config.json` of a transformers folder.

    Raises:
      ValueError: if there is no such file, or it does not describe a model that ours can represent.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a published {CLASS}")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than a configuration can need")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, a configuration is an object")
    return Qwen3VLConfig.from_dict(fields)
