"""Names of the published DINOv2 tensors (`Dinov2Model` and `Dinov2WithRegistersModel` of transformers)."""

import dataclasses

from qi2_jax.interop.tensor_names import NameMap
from qi2_jax.models.dinov2 import Dinov2Config

NAMES = NameMap(
    renames=(
        ("embeddings.cls_token", "class_token"),
        ("embeddings.register_tokens", "registers"),
        ("embeddings.position_embeddings", "positions"),
        ("embeddings.patch_embeddings.projection.", "patches."),
        ("encoder.layer.{}.attention.output.dense.", "layers.attention.output."),
        ("encoder.layer.{}.attention.attention.", "layers.attention."),
        ("encoder.layer.{}.layer_scale1.lambda1", "layers.scale1"),
        ("encoder.layer.{}.layer_scale2.lambda1", "layers.scale2"),
        ("encoder.layer.{}.", "layers."),
        ("layernorm.", "norm."),
    ),
    passthrough=(r"embeddings\.mask_token",),  # replaces patches in DINOv2's own training
)


def name_map(config: Dinov2Config) -> NameMap:
    """The name map, with the mask token as a passthrough tensor."""
    shapes = {"embeddings.mask_token": (1, config.width)}
    return dataclasses.replace(NAMES, passthrough_shapes=shapes, optional=tuple(shapes))
