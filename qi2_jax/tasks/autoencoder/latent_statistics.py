"""Mean and standard deviation of each latent channel over a data set.

They are stored with the trained autoencoder; caches, sampler and export normalise latents with them. Every process
encodes a share of the images, each in its bucket, on its devices. The moments of the latents of each image are added up
in float64, so the result does not depend on batches, devices or processes beyond the rounding of the encoder.

Dims: `C` latent channels, `B` batch, `H` `W` pixels, `c` image channels.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm

from data_pipeline.loading.crops import SelectedImages
from qi2_jax import sharding
from qi2_jax.inference.encoders import ImageEncoder
from qi2_jax.interop import stored_weights
from qi2_jax.interop.stored_weights import Weights
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.runtime import processes
from qi2_jax.runtime.atomic import write_json_atomic
from qi2_jax.runtime.read_ahead import map_ahead

FILE = "latent_statistics.json"  # in the folder of the run
SMALLEST_STD = 1e-3  # so that normalising does not amplify the noise of a constant channel
IMAGES_PER_DEVICE = 4  # of 256 x 256 pixels
PRECISION = "highest"  # of fp32 products, which TPUs otherwise compute from values rounded to bf16
DECODERS = min(8, os.cpu_count() or 1)  # threads that decode images

ENCODER = ("encoder.", "quant_conv.")  # prefixes of the parameters that latents depend on


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of a set of latents, in float64.

    Attributes:
      count: number of latents.
      mean_C: mean of each channel.
      squares_C: sum of the squared deviations from the mean.
    """

    count: int
    mean_C: Float[np.ndarray, " C"]
    squares_C: Float[np.ndarray, " C"]

    @classmethod
    def none(cls, channels: int) -> "Moments":
        """The moments of no latents."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, latents: Float[AnyArray, "... C"]) -> "Moments":
        """The moments of some latents."""
        flat = np.asarray(latents, np.float64).reshape(-1, latents.shape[-1])
        mean_C = flat.mean(axis=0)
        return cls(len(flat), mean_C, np.square(flat - mean_C).sum(axis=0))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if not count:
            return self
        between_C, share = other.mean_C - self.mean_C, other.count / count
        squares_C = self.squares_C + other.squares_C + between_C**2 * (self.count * share)
        return Moments(count, self.mean_C + between_C * share, squares_C)

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(self.mean_C.tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, at least `SMALLEST_STD`."""
        return tuple(np.sqrt(np.maximum(self.squares_C / max(self.count, 1), SMALLEST_STD**2)).tolist())


def of_crops(vae: VAE, crops: Iterable[Float[np.ndarray, "B H W c"]]) -> Moments:
    """The moments of the latents of some batches of pixels in [-1, 1]."""
    encode = jax.jit(lambda vae, pixels: vae.encode(pixels).mean)
    moments = (Moments.of(encode(vae, pixels)) for pixels in crops)
    with jax.default_matmul_precision(PRECISION):
        return functools.reduce(operator.add, moments, Moments.none(vae.config.latent_channels))


def of_images(
    config: VAEConfig, weights: Weights, images: SelectedImages, count: int, mesh: Mesh, run: pathlib.Path
) -> Moments:
    """The moments of the latents of images, measured by all processes or read from an earlier call of the same run.

    An interrupted measurement begins anew.

    Args:
      config: architecture of the autoencoder.
      weights: trained parameters.
      images: images, each of which is encoded at the size of its bucket.
      count: number of images, evenly spaced among all; 0: all.
      mesh: devices of the run.
      run: folder of the run, which receives the result as `latent_statistics.json`.
    """
    chosen = images if not 0 < count < len(images) else images.subset([i * len(images) // count for i in range(count)])
    known: Moments | None = None
    with processes.raise_together():
        if jax.process_index() == 0:
            made_from = {"encoder": _digest(weights), "pictures": chosen.digest}
            known = _read(run / FILE, made_from)
    if processes.all_true(jax.process_index() != 0 or known is not None):
        return _gathered(known or Moments.none(config.latent_channels))
    with processes.raise_together(), jax.default_matmul_precision(PRECISION):
        measured = _measure(_encoder(config, weights, mesh), chosen)
    measured = _gathered(measured)
    with processes.raise_together():
        if jax.process_index() == 0:
            facts = {"images": len(chosen), "latents": measured.count}
            values = {"mean": measured.mean, "squared_deviations": measured.squares_C.tolist()}
            write_json_atomic(run / FILE, {"made_from": made_from, **facts, **values})
    return measured


def _encoder(config: VAEConfig, weights: Weights, mesh: Mesh) -> ImageEncoder:
    """The encoder on the devices of this process, each of which has all weights and a share of every batch."""
    config = dataclasses.replace(config, latents_mean=None, latents_std=None)  # raw latents
    like = jax.eval_shape(lambda: VAE(config, key=jax.random.key(0)))
    del like.decoder, like.post_quant_conv
    local = sharding.make_mesh(sharding.MeshShape(data=len(mesh.local_devices)), mesh.local_devices)
    vae = stored_weights.load(weights, like, sharding.shardings(like, local))
    return ImageEncoder(vae, local, np.float32, IMAGES_PER_DEVICE * local.size)


def _measure(encoder: ImageEncoder, images: SelectedImages) -> Moments:
    """The moments of this process's share of the images."""
    batches = list(_batches(encoder, images))
    positions = list(itertools.chain.from_iterable(batches))
    ahead = 2 * max(map(len, batches), default=1)
    moments = Moments.none(encoder.vae.config.latent_channels)
    hidden = jax.process_index() != 0
    with (
        contextlib.closing(map_ahead(images.__getitem__, positions, ahead, DECODERS)) as decoded,
        tqdm(total=len(positions), desc="latents", unit="image", dynamic_ncols=True, disable=hidden) as bar,
    ):
        for batch in batches:
            for latents in encoder.latents(list(itertools.islice(decoded, len(batch)))):
                moments += Moments.of(latents)
            bar.update(len(batch))
    return moments


def _batches(encoder: ImageEncoder, images: SelectedImages) -> Iterator[list[int]]:
    """Positions of this process's images, in batches of one bucket."""
    share = range(jax.process_index(), len(images), jax.process_count())
    buckets = [image.bucket for image in images.chosen]
    ordered = sorted(share, key=lambda position: (buckets[position].width, buckets[position].height))
    for bucket, positions in itertools.groupby(ordered, key=lambda position: buckets[position]):
        size = encoder.images_at_once(bucket.width, bucket.height)
        yield from (list(batch) for batch in _chunks(positions, size))


def _chunks(items: Iterable[int], size: int) -> Iterator[Sequence[int]]:
    items = iter(items)
    return iter(lambda: tuple(itertools.islice(items, size)), ())


def _gathered(moments: Moments) -> Moments:
    """The moments of all processes together."""
    texts = processes.gather(json.dumps([moments.count, moments.mean_C.tolist(), moments.squares_C.tolist()]))
    return functools.reduce(operator.add, (_parsed(*json.loads(text)) for text in texts))


def _parsed(count: int, mean: list[float], squares: list[float]) -> Moments:
    return Moments(count, np.array(mean, np.float64), np.array(squares, np.float64))


def _digest(weights: Weights) -> str:
    """A hash of the encoder's parameters."""
    total = hashlib.sha256()
    for name in sorted(name for name in weights if name.startswith(ENCODER)):
        total.update(name.encode() + np.ascontiguousarray(weights[name].read()).tobytes())
    return total.hexdigest()


def _read(path: pathlib.Path, made_from: Mapping[str, Any]) -> Moments | None:
    """The moments in a file; None if there is no such file, or if it was made from other weights or images."""
    try:
        found = json.loads(path.read_bytes())
        same = found["made_from"] == made_from
        return _parsed(found["latents"], found["mean"], found["squared_deviations"]) if same else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
