"""The autoencoders that are compared: ours in JAX, and published ones in PyTorch.

Dims: `B` images, `H` `W` pixels.
"""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import numpy as np
from jaxtyping import UInt8

from data_pipeline.selection.index import INDEX, selection_facts
from qi2_jax.config.parsing import parse
from qi2_jax.evaluation import torch_process
from qi2_jax.inference import tiling
from qi2_jax.interop import components, files, stored_weights
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.pixels import normalize, to_image
from qi2_jax.runs import locating, paths
from qi2_jax.runtime import logs
from qi2_jax.training.checkpoints import checksums, contents
from qi2_jax.training.checkpoints.files import steps

_log = logging.getLogger(__name__)


class Described(Protocol):
    """An autoencoder as tables show it, whether it is in memory or not.

    Attributes:
      name: name in tables.
      factor: pixels per latent along height and width.
      channels: latent channels.
      digest: hash of the weights; None for a code that is fitted here.
    """

    @property
    def name(self) -> str: ...

    @property
    def factor(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def digest(self) -> str | None: ...


class Reconstructs(Protocol):
    """Anything in memory that encodes and decodes images."""

    def reconstruct(self, images_BHWc: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Encodes and decodes images whose sides are multiples of the factor; rounded to 8 bits."""
        ...


@dataclasses.dataclass(frozen=True)
class JaxAutoencoder:
    """One of our autoencoders, not loaded yet.

    Attributes:
      name: name in tables.
      config: its configuration.
      weights: its weights, which are read on demand.
      trained_on: digests of the folders of records that its run selected from, as far as they are recorded.
    """

    name: str
    config: VAEConfig
    weights: stored_weights.Weights
    trained_on: frozenset[str] = frozenset()

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    @property
    def digest(self) -> str:
        """SHA-256 of the names, dtypes, shapes and values of the weights, wherever they are stored."""
        found = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            found.update(f"{name} {weight.code} {weight.shape}\n".encode() + weight.read().tobytes())
        return found.hexdigest()

    @contextlib.contextmanager
    def loaded(self) -> Iterator["LoadedJaxAutoencoder"]:
        """The model in memory, in fp32."""
        like = components.COMPONENTS["vae"].abstract(self.config)
        with logs.loading(_log, "vae", sum(leaf.size for leaf in jax.tree.leaves(like))):
            vae = stored_weights.load(self.weights, like, dtype=np.float32)
        yield LoadedJaxAutoencoder(vae)


@dataclasses.dataclass(frozen=True)
class LoadedJaxAutoencoder:
    """One of our autoencoders in memory."""

    vae: VAE

    def reconstruct(self, images_BHWc: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
        """See `Reconstructs`; a model with alpha gets opaque images, and its decoded alpha is ignored.

        Raises:
          ValueError: if a pixel is not finite.
        """
        if self.vae.config.in_channels == 4:
            opaque = np.full((*images_BHWc.shape[:3], 1), 255, np.uint8)
            images_BHWc = np.concatenate([images_BHWc, opaque], axis=-1)
        pixels_BHWc = normalize(images_BHWc)
        with jax.default_matmul_precision("highest"):
            latents_BhwC = np.asarray(tiling.encode(self.vae, pixels_BHWc, np.float32))
            rebuilt = tiling.decode(self.vae, latents_BhwC, np.float32)
        return np.stack([to_image(image)[..., :3] for image in rebuilt])


Autoencoder = JaxAutoencoder | torch_process.TorchAutoencoder


def find(path: pathlib.Path, item: str = "ema") -> Autoencoder:
    """The autoencoder that a path contains.

    Args:
      path: a run of the autoencoder or a checkpoint of it; a run, job or model folder with all components; or a
        diffusers folder, of an autoencoder or of a whole pipeline.
      item: weights of a run of the autoencoder, "ema" or "model" (raw weights).

    Raises:
      ValueError: if the path is none of these, or what it contains is damaged or not supported.
    """
    name = str(path)
    if (place := _published(path)) is not None:
        return torch_process.find(name, place)
    if (trained := _trained(path, item, name)) is not None:
        return trained
    if _class_of(path) == components.COMPONENTS["vae"].published[1]:  # the part `vae` of a model folder
        return _from_folder(name, path)
    return _from_folder(name, locating.locate(path).model / "vae")


def _published(path: pathlib.Path) -> pathlib.Path | None:
    """The folder of a published autoencoder: the path itself, or its part `vae`; None if it has no such weights."""
    places = (path, path / "vae")
    return next((place for place in places if _class_of(place) and torch_process.has_weights(place)), None)


def _class_of(folder: pathlib.Path) -> str | None:
    path = folder / "config.json"
    found = files.read_json(path).get("_class_name") if path.is_file() else None
    return found if isinstance(found, str) else None


def _from_folder(name: str, folder: pathlib.Path) -> JaxAutoencoder:
    config = components.read_config(folder, "vae")
    weights, _ = stored_weights.open_ours(folder, components.COMPONENTS["vae"].expected(config))
    return JaxAutoencoder(name, config, weights, _trained_on(folder.absolute()))


def _trained_on(place: pathlib.Path) -> frozenset[str]:
    """Digests of the records of the run that trained the autoencoder in `place`, its checkpoint, run or model folder.

    The run, job or curriculum is one of the folders above `place`; without a record of it, the result is empty.
    """
    for folder in (place, *place.parents[:5]):
        if (folder / paths.VAE / paths.CHECKPOINTS).is_dir():  # a job or a curriculum that trained it
            indices = [folder / "records" / INDEX, *sorted(folder.glob(f"{paths.STAGES}/*/{INDEX}"))]
        else:
            indices = [folder / INDEX] if (folder / paths.CHECKPOINTS).is_dir() else []
        if found := [selection_facts(index).get("records") for index in indices if index.is_file()]:
            return frozenset(digest for digest in found if digest)
    return frozenset()


def _trained(path: pathlib.Path, item: str, name: str) -> JaxAutoencoder | None:
    """The newest checkpoint of a run of the autoencoder, or the checkpoint itself; None for other paths."""
    path = path.absolute()
    is_checkpoint = path.parent.name == paths.CHECKPOINTS
    run = path.parent.parent if is_checkpoint else path
    values = files.read_json(run / paths.CONFIG) if (run / paths.CONFIG).is_file() else {}
    model = values.get("model")
    if not isinstance(model, Mapping) or "latent_channels" not in model:
        return None
    config = parse(VAEConfig, model, "model")
    saved = steps(run / paths.CHECKPOINTS)
    if is_checkpoint and path.name not in map(str, saved):
        raise ValueError(f"{path} is not a complete checkpoint; {run} has those of the steps {saved}")
    if not saved:
        raise ValueError(f"{run} has no complete checkpoint in {run / paths.CHECKPOINTS}")
    checkpoint = path if is_checkpoint else run / paths.CHECKPOINTS / str(saved[-1])
    if wrong := checksums.problems(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} is damaged: {'; '.join(wrong)}")
    expected = components.COMPONENTS["vae"].expected(config)
    # Parameters that only the loss uses are trained beside the autoencoder; they are left out.
    weights = {name: weight for name, weight in contents.weights(checkpoint, item).items() if name in expected}
    stored_weights.check_ours({name: weight.shape for name, weight in weights.items()}, expected, str(checkpoint))
    shown = f"{name} ({item})" if is_checkpoint else f"{name}@{checkpoint.name} ({item})"
    return JaxAutoencoder(shown, config, weights, _trained_on(checkpoint))
