"""Text features that are computed during training.

The host prepares prompts, and the frozen encoder runs on the mesh. The features replace those that other samples have
cached.

Dims: `B` batch, `S` tokens of the encoder, `T` text slots, `E` width of text features, `k` condition images of a
sample, `P` patches and `M` features of an image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from data_pipeline.samples.schema import Sample
from qi2_jax.attention import Kernel
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.qwen3_vl.inputs import EncoderInputs, VisionInputs
from qi2_jax.models.qwen3_vl.model import Qwen3VL
from qi2_jax.sequence import Layout
from qi2_jax.text.prompts import PromptProcessor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Prompts prepared for the encoder; all arrays have one row per sample, so that hosts and devices can split them.

    Attributes:
      input_ids, valid, positions: see `EncoderInputs`; positions are [B, S, 3].
      slots: for each text slot, the index among the S tokens of its feature; S for padding.
      vision: see `VisionInputs`, [B, k, ...]; its `slots` count within their row. None without condition images.
    """

    input_ids: Int[AnyArray, "B S"]
    valid: Any
    positions: Int[AnyArray, "B S 3"]
    slots: Int[AnyArray, "B T"]
    vision: VisionInputs | None


def prompt_rows(processor: PromptProcessor, layout: Layout, samples: Sequence[Sample]) -> PromptRows:
    """Prepares the prompts of a batch on the host.

    Raises:
      ValueError: if the samples contain features instead of prompts.
    """
    texts = [sample.texts[0] for sample in samples]
    prompts = [text.prompt for text in texts if text.prompt is not None]
    if len(prompts) < len(texts) or texts[0].features.shape[-1]:
        raise ValueError(
            "these samples contain text features; encode them with encode.online=text to compute them here"
        )
    # The longest possible prompt: all text slots, one feature per four latents of each image, and the system turn.
    most = sum(layout.text) + sum(layout.conditions) // 4 + processor.num_system_tokens
    images = [[Image.fromarray(pixels) for pixels in sample.condition_pixels] for sample in samples]
    patches = max(layout.conditions, default=0)
    batch = processor(prompts, images, multiple=most, enlarge=False, patch_count=patches or None)
    B, S = batch.inputs.input_ids.shape
    slots = np.full((B, sum(layout.text)), S, np.int32)
    for row, segments in enumerate(batch.segments):
        # The tokens of a prompt are at the end of its row.
        slots[row, layout.text_slots(segments.text_lengths)] = segments.text_indices + S - segments.length
    vision = batch.inputs.vision
    if vision is not None:
        vision = jax.tree.map(lambda leaf: leaf.reshape(B, -1, *leaf.shape[1:]), vision)
        empty = vision.slots == B * S
        vision = dataclasses.replace(vision, slots=np.where(empty, S, vision.slots % S).astype(np.int32))
    positions = np.ascontiguousarray(batch.inputs.positions.transpose(1, 2, 0))
    return PromptRows(batch.inputs.input_ids, batch.inputs.valid, positions, slots, vision)


def text_features(encoder: Qwen3VL, prompts: PromptRows, *, kernel: str | Kernel = "auto") -> Float[Array, "B T E"]:
    """Features for all text slots, zero at padding, in the dtype of the encoder's embeddings."""
    B, S = prompts.input_ids.shape
    vision = prompts.vision
    if vision is not None:
        rows = jnp.arange(B, dtype=jnp.int32)[:, None, None] * S
        slots = jnp.where(vision.slots == S, B * S, vision.slots + rows)
        vision = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), dataclasses.replace(vision, slots=slots))
    inputs = EncoderInputs(prompts.input_ids, prompts.valid, prompts.positions.transpose(2, 0, 1), vision)
    hidden_BSE = encoder(inputs, kernel=kernel)
    taken_BTE = jnp.take_along_axis(hidden_BSE, jnp.minimum(prompts.slots, S - 1)[..., None], axis=1)
    return jnp.where((prompts.slots < S)[..., None], taken_BTE, jnp.zeros((), taken_BTE.dtype))
