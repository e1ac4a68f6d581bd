"""Batches: samples padded to a common layout, as the transformer reads them.

Dims: `B` rows, `S` joint sequence, `N` target slots, `M` condition slots, `T` text slots, `C` latent channels, `E`
text features.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from data_pipeline.samples.schema import Sample, Text
from qi2_jax import sequence
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.mmdit import Conditioning


class Batch(NamedTuple):
    """Clean target latents, normalised per channel, and what they are conditioned on.

    Attributes:
      latents_BNC: latents of the targets; without channels if the encoders still have to compute them.
      cond: text features, condition latents, positions and validity; the features have no width if the text encoder
        still has to compute them.
      prompts: inputs of the text encoder, if features are computed within the step.
      samples: samples of the rows, on the host, if an encoder still has to run.
    """

    latents_BNC: Float[AnyArray, "B N C"]
    cond: Conditioning
    prompts: Any = None
    samples: tuple[Sample, ...] = ()


def with_text(sample: Sample, text: Text) -> Sample:
    """The sample with `text` as its only text."""
    return dataclasses.replace(sample, texts=(text,))


def collate(layout: sequence.Layout, samples: Sequence[Sample]) -> Batch:
    """Pads samples to a layout, as host arrays. The first text of each sample is used.

    Raises:
      ValueError: if a sample does not fit.
    """
    texts = [sample.texts[0] for sample in samples]
    rows, features = len(samples), texts[0].features
    text_BTE = np.zeros((rows, sum(layout.text), features.shape[-1]), features.dtype)
    positions_BS3, valid_BS = np.zeros((rows, layout.length, 3), np.int32), np.zeros((rows, layout.length), bool)
    for row, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        grids = [latents.shape[:2] for latents in sample.conditions]
        positions_BS3[row], valid_BS[row] = sequence.place(layout, text.lengths, sample.latents.shape[:2], grids)
        text_BTE[row, layout.text_slots(text.lengths)] = text.features
    latents_BNC, conditions_BMC = _place_latents(layout, samples)
    incomplete = not text_BTE.shape[-1] or samples[0].target_pixels is not None
    return Batch(
        latents_BNC,
        Conditioning(text_BTE, positions_BS3, valid_BS, conditions_BMC),
        samples=tuple(samples) if incomplete else (),
    )


def _place_latents(
    layout: sequence.Layout, samples: Sequence[Sample]
) -> tuple[Float[np.ndarray, "B N C"], Float[np.ndarray, "B M C"] | None]:
    """Target latents and condition latents in their slots; None instead of the latter if the layout has none."""
    C = samples[0].latents.shape[-1]
    starts = np.cumsum([0, *layout.conditions])
    latents_BNC = np.zeros((len(samples), layout.target, C), np.float32)
    conditions_BMC = np.zeros((len(samples), starts[-1], C), np.float32)
    for row, sample in enumerate(samples):
        _fill(latents_BNC[row], 0, sample.latents)
        for start, latents in zip(starts, sample.conditions, strict=False):
            _fill(conditions_BMC[row], start, latents)
    return latents_BNC, conditions_BMC if layout.conditions else None


def _fill(slots: np.ndarray, start: int, latents: np.ndarray) -> None:
    tokens = latents.shape[0] * latents.shape[1]
    slots[start : start + tokens] = latents.reshape(tokens, latents.shape[-1])
