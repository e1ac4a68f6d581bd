"""The linear layers that an adapter file can name, and where they are in our transformer."""

import dataclasses

from qi2_jax.interop.components import COMPONENTS
from qi2_jax.interop.mmdit import NAMES
from qi2_jax.models import lora
from qi2_jax.models.mmdit import MMDiTConfig

# ComfyUI multiplies by both matrices of the SwiGLU at once: the rows of the gate come first.
FUSED_NAME, FUSED_PARTS = "img_mlp.gate_up", ("img_mlp.gate_layer", "img_mlp.proj")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One matrix of our transformer.

    Attributes:
      path: our path of the linear layer, such as "blocks.attn.q".
      layer: index in the stack of blocks; None if the layer is not stacked.
      shape: (out, in).
    """

    path: str
    layer: int | None
    shape: tuple[int, int]


# {published path of a layer: the matrices whose rows it contains, in order}
Targets = dict[str, tuple[Matrix, ...]]


def targets(base_config: MMDiTConfig) -> Targets:
    """Every linear layer by its published path, and ComfyUI's fused layers by theirs.

    Raises:
      ValueError: if no transformer can be built from the configuration.
    """
    result: Targets = {}
    for path, linear in lora.linears(COMPONENTS["transformer"].abstract(base_config)).items():
        shape = linear.weight.shape
        for name in NAMES.to_published(f"{path}.weight", shape):
            layer = NAMES.to_ours(name)[1]
            result[name.removesuffix(".weight")] = (Matrix(path, layer, (shape[-2], shape[-1])),)
    gate, up = FUSED_PARTS
    for name in [name for name in result if name.endswith(gate)]:
        block = name.removesuffix(gate)
        result[block + FUSED_NAME] = result[name] + result[block + up]
    return result
