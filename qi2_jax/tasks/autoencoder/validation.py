"""Validation of the autoencoder: reconstructions of the central crops of held-out images.

All crops are squares of `crop` pixels, the size of the first phase, in every phase: one program computes them, curves
do not jump where a phase begins, and `checkpoint.keep_best` compares the same crops.

Dims: `B` batch, `H` `W` pixels, `c` image channels, `M` held-out images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from data_pipeline.loading.crops import SelectedImages, center_crop
from data_pipeline.loading.kinds import split_by_kind
from qi2_jax import sharding
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.vae import VAE
from qi2_jax.pixels import normalize
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig
from qi2_jax.tasks.autoencoder.networks import Networks
from qi2_jax.tasks.autoencoder.objective import Crop, Objective

Values = Mapping[str, Float[np.ndarray, " M"]]  # of each image, by metric


class HeldOut(NamedTuple):
    """Held-out crops.

    Attributes:
      batches: crops of this process in each batch, 0..255. Repetitions fill up the last batch.
      batch_size: global number of crops in a batch.
      kinds: kind of each image, in the order of the crops; "" without kinds.
    """

    batches: Sequence[UInt8[np.ndarray, "_ H W c"]]
    batch_size: int
    kinds: Sequence[str]


def choose(config: AutoencoderConfig, images: SelectedImages) -> tuple[SelectedImages, list[str]]:
    """At most `validation.images` images, with the kind of each.

    Kinds in use have equal numbers of them, evenly spaced within each kind. A kind with fewer images leaves its turns
    to the others. Images in which a square of `config.crop` has no room are left out.

    Args:
      config: config of the run.
      images: images that may be chosen, in the order of their records.

    Raises:
      ValueError: if all images are too small or of kinds that are not used.
    """
    used = {kind for phase in config.phases.values() for kind, share in phase.kind_shares.items() if share}
    buckets, count = [image.bucket for image in images.chosen], config.validation.images
    fitting = {
        kind: [place for place in found if min(buckets[place].width, buckets[place].height) >= config.crop]
        for kind, found in split_by_kind(images, config.kinds).items()
        if kind in used
    }
    turns = [kind for number in range(count) for kind, found in fitting.items() if number < len(found)][:count]
    if not turns:
        raise ValueError(
            f"0 of the {len(images):,} images for validation have sides of at least {config.crop} pixels"
            f"{f' and are of the kinds {sorted(used)}' if config.kinds else ''}; choose a smaller vae.crop, or raise "
            "data.sides, data.thresholds.min_side or data.held_out"
        )
    spaced = {kind: iter(_spaced(found, turns.count(kind))) for kind, found in fitting.items()}
    return images.subset([next(spaced[kind]) for kind in turns]), turns


def _spaced(positions: Sequence[int], count: int) -> list[int]:
    """Some of the positions, evenly spaced among all."""
    return [positions[number * len(positions) // count] for number in range(count)]


def held_out(config: AutoencoderConfig, images: SelectedImages, kinds: Sequence[str], mesh: Mesh) -> HeldOut:
    """The central crops of images, in batches that are not larger than those of training.

    Args:
      config: config of the run.
      images: images that `choose` returned.
      kinds: kind of each image.
      mesh: devices of the run.
    """
    size = min(config.batch_size, sharding.padded_size(mesh, len(images)))
    rows = sharding.local_rows(mesh, size)
    batches = [
        np.stack([center_crop(images[(start + row) % len(images)], config.crop) for row in rows])
        for start in range(0, len(images), size)
    ]
    return HeldOut(batches, size, kinds)


def make_validation(objective: Objective, mesh: Mesh) -> Callable[..., Values]:
    """Makes a function `(vae, networks, held_out, check_signals) -> values`, with the metrics of each image.

    The metrics are `loss`, see `Objective.evaluate`, and those of the terms; the alignment's have margins of 0. Each
    image is evaluated by itself, so the values do not depend on the other images of its batch. `check_signals` is
    called before each batch and may raise to end the validation.
    """

    def of_image(vae: VAE, networks: Networks, pixels_HWc: Float[Array, "H W c"]) -> dict[str, Any]:
        batch = Crop(pixels_HWc[None], jnp.zeros((1, 3)))
        value, metrics = objective.evaluate(vae, networks, batch, jax.random.key(0)[None])
        return {"loss": value, **metrics}

    def of_batch(vae: VAE, networks: Networks, pixels_BHWc: Float[AnyArray, "B H W c"]) -> dict[str, Any]:
        return jax.vmap(lambda pixels_HWc: of_image(vae, networks, pixels_HWc))(pixels_BHWc)

    # Every process reads the values of all images.
    evaluate = jax.jit(of_batch, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def validate(
        vae: VAE, networks: Networks, held_out: HeldOut, check_signals: Callable[[], None] = lambda: None
    ) -> Values:
        found = []
        for crops in held_out.batches:
            check_signals()
            pixels_BHWc = sharding.put_batch(mesh, normalize(crops), held_out.batch_size)
            found.append(jax.device_get(evaluate(vae, networks, pixels_BHWc)))
        count = len(held_out.kinds)
        return {name: np.concatenate([values[name] for values in found])[:count] for name in found[0]}

    return validate


def report(values: Values, kinds: Sequence[str], suffix: str) -> dict[str, float]:
    """Validation metrics: means over all images, and over those of each kind.

    Args:
      values: metrics of each image.
      kinds: kind of each image; "" without kinds.
      suffix: end of the metrics' names.
    """
    metrics = {f"validation_{name}{suffix}": _mean(values_M) for name, values_M in values.items()}
    for kind in sorted({*kinds} - {""}):
        of_kind_M = np.asarray(kinds) == kind
        metrics |= {
            f"validation_{name}/{kind}{suffix}": _mean(values_M[of_kind_M]) for name, values_M in values.items()
        }
    return metrics


def _mean(values_M: Float[np.ndarray, " M"]) -> float:
    return float(values_M.mean(dtype=np.float64))
