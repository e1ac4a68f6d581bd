"""The condition encoder: Qwen3-VL up to the output of its last decoder layer.

Dims: `B` prompts, `S` tokens, `D` width of the text tower, `I` images, `M` features per image, `N` DeepStack taps.
"""

from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.attention import Kernel
from qi2_jax.models.layers import keys
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.models.qwen3_vl.inputs import EncoderInputs
from qi2_jax.models.qwen3_vl.text import TextTower, place
from qi2_jax.models.qwen3_vl.vision import VisionTower


class Qwen3VL(nnx.Module):
    """Vision and text tower, without the final norm and the language head.

    The diffusion transformer reads the hidden state before them.
    """

    def __init__(self, config: Qwen3VLConfig, *, key: Array):
        rng = keys(key)
        self.visual = VisionTower(config.vision, key=next(rng))
        self.language_model = TextTower(config.text, key=next(rng))

    def __call__(self, inputs: EncoderInputs, *, kernel: str | Kernel = "auto") -> Float[Array, "B S D"]:
        """Hidden state of the last decoder layer, before the final norm.

        Args:
          inputs: result of `prepare_inputs`. Batches with and without images need two compiled programs.
          kernel: attention kernel, one of `qi2_jax.attention.KERNELS`.

        Returns:
          Hidden states in the dtype in which the token embeddings are stored; meaningless at padding.
        """
        x_BSD = self.language_model.embed_tokens(inputs.input_ids)
        slots_IM, taps_NIMD = None, None
        if inputs.vision is not None:
            slots_IM = inputs.vision.slots
            features_IMD, taps_NIMD = self.visual(inputs.vision, kernel=kernel)
            x_BSD = place(x_BSD, slots_IM, features_IMD)
        return self.language_model(x_BSD, inputs.positions, inputs.valid, slots_IM, taps_NIMD, kernel=kernel)
