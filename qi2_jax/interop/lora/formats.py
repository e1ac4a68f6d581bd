"""The names of an adapter's tensors in each format.

| written by | example |
| --- | --- |
| diffusers | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` |
| peft | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` |
| ComfyUI | `diffusion_model.transformer_blocks.0.attn.to_q.lora_down.weight`, `[..].alpha` |
| DiffSynth-Studio | `pipe.dit.transformer_blocks.0.attn.to_q.lora_A.default.weight` |
| kohya | `lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight`, `[..].alpha` |

Prefixes and suffixes are recognised independently of each other, because tools mix them.
"""

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

PEFT_PREFIX = "base_model.model."
PREFIXES = (PEFT_PREFIX, "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # prefixes of names whose dots have become underscores

MAX_NAME = 256  # characters; a longer name could take for ever to match

_FACTOR = re.compile(r"(?P<layer>.+?)\.lora[_.](?P<factor>A|B|down|up)(?:\.[\w-]+)?\.weight")
_ALPHA = re.compile(r"(?P<layer>.+?)\.alpha")
_TEXT_ENCODER = re.compile(r"(text_encoders?(_\d)?|lora_te\d?|te\d?|clip_[lgh]|conditioner|cond_stage_model)[._].*")
_OTHER_KINDS = (
    (r"dora_scale|lora_magnitude_vector(\..+)?", "DoRA, which also rescales the rows of the weight"),
    (r"lokr_\w+", "LoKr, whose change is a Kronecker product"),
    (r"hada_\w+", "LoHa, whose change is an elementwise product"),
    (r"lora_mid(\.weight)?", "LoCon with a third factor"),
    (r"(oft|boft)_\w+(\.\w+)*", "OFT, which rotates the weight"),
    (r"lora[_.](A|B|down|up)(\.\w+)?\.bias", "a bias, which this transformer does not have"),
    (r"diff|diff_b|w_norm|b_norm|set_weight|reshape_weight", "a full change, not a low-rank one"),
)
_OTHER = tuple((re.compile(rf".+\.({pattern})"), kind) for pattern, kind in _OTHER_KINDS)


class Tensor(NamedTuple):
    """The meaning of a tensor's name.

    Attributes:
      layer: published path of the linear layer.
      role: factor A or B, or the layer's alpha.
    """

    layer: str
    role: Literal["A", "B", "alpha"]


class NotReadError(ValueError):
    """A tensor that is not part of a plain LoRA of the transformer; the message says what it is."""


def parse(name: str, layers: Collection[str], flat_layers: Mapping[str, str]) -> Tensor:
    """Parses a tensor's name.

    Args:
      name: name in the file.
      layers: published paths of the layers that can be adapted.
      flat_layers: these paths by their flat names, see `flattened`.

    Raises:
      NotReadError: if the tensor is not a factor or alpha of one of these layers.
    """
    if len(name) > MAX_NAME:
        raise NotReadError(f"is a name of {len(name)} characters")
    if _TEXT_ENCODER.fullmatch(name):
        raise NotReadError("changes the text encoder, which qi2 keeps as it is")
    for pattern, kind in _OTHER:
        if pattern.fullmatch(name):
            raise NotReadError(f"is {kind}")
    match = _FACTOR.fullmatch(name) or _ALPHA.fullmatch(name)
    if match is None:
        raise NotReadError("is not a name of a LoRA tensor")
    layer = _layer(match["layer"], layers, flat_layers)
    if layer is None:
        raise NotReadError("names no linear layer of this transformer")
    factor = match.groupdict().get("factor")
    return Tensor(layer, "alpha" if factor is None else "A" if factor in ("A", "down") else "B")


def flattened(layers: Collection[str]) -> dict[str, str]:
    """{path with underscores for dots: path}: a flat name can only be looked up, not converted back."""
    return {layer.replace(".", "_"): layer for layer in layers}


def _layer(path: str, layers: Collection[str], flat_layers: Mapping[str, str]) -> str | None:
    for prefix in FLAT_PREFIXES:
        if path.startswith(prefix):
            return flat_layers.get(path.removeprefix(prefix))
    while prefix := next((prefix for prefix in PREFIXES if path.startswith(prefix)), ""):
        path = path.removeprefix(prefix)
    return path if path in layers else None
