"""Names of the published CLIP and SigLIP tensors."""

from qi2_jax.interop.tensor_names import NameMap

NAMES = NameMap(
    renames=tuple(
        (f"{tower}_model.encoder.layers.{{}}.", f"{tower}_model.encoder.layers.") for tower in ("vision", "text")
    ),
    passthrough=(r"(vision|text)_model\.embeddings\.position_ids",),  # a buffer in early files
)
