"""The frozen networks of the loss: LPIPS, and the network whose features the latents are aligned with."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qi2_jax.interop import frozen
from qi2_jax.models.dinov2 import Dinov2
from qi2_jax.models.lpips import LPIPS
from qi2_jax.tasks.autoencoder.alignment import feature_channels
from qi2_jax.tasks.autoencoder.config import AlignmentConfig, PerceptualConfig

READERS: dict[str, Callable[..., Any]] = {"dinov2": frozen.read_dinov2, "vgg16": frozen.read_lpips}


class Networks(NamedTuple):
    """Arguments of the compiled programs; a term that is switched off has None.

    Attributes:
      lpips: perceptual distance.
      features: network that latents are aligned with; of LPIPS only VGG16 is used.
    """

    lpips: LPIPS | None = None
    features: LPIPS | Dinov2 | None = None


def load(
    perceptual: PerceptualConfig, alignment: AlignmentConfig, mesh: Mesh
) -> tuple[Networks, dict[str, dict[str, str]]]:
    """The networks of the terms that are not switched off, on every device, and the SHA-256 of their weights by term.

    Raises:
      ValueError: if weights are missing or do not fit, or a network does not have the layer.
    """
    networks, digests = Networks(), {}
    if perceptual.weight:
        networks = networks._replace(lpips=_read("perceptual", frozen.read_lpips, perceptual.folder, mesh))
        digests["perceptual"] = frozen.digest(perceptual.folder)
    if alignment.weight:
        features = _read("alignment", READERS[alignment.network], alignment.folder, mesh)
        feature_channels(features, alignment.layer)
        networks = networks._replace(features=features)
        digests["alignment"] = frozen.digest(alignment.folder)
    return networks, {"frozen": digests} if digests else {}


def check_folders(perceptual: PerceptualConfig, alignment: AlignmentConfig) -> None:
    """Raises a ValueError if the folder of a term that is not switched off has no network, before any work is done."""
    for term, config in (("perceptual", perceptual), ("alignment", alignment)):
        if config.weight and not (pathlib.Path(config.folder) / "config.json").is_file():
            raise _error(term, config.folder, f"{config.folder}/config.json does not exist")


def _error(term: str, folder: str, reason: object) -> ValueError:
    return ValueError(
        f"vae.{term}.folder={folder}: {reason}. See docs/perceptual_weights.md, or set vae.{term}.weight=0"
    )


def _read(term: str, read: Callable[..., Any], folder: str, mesh: Mesh) -> Any:
    try:
        return read(pathlib.Path(folder), shardings=NamedSharding(mesh, PartitionSpec()))
    except ValueError as error:
        raise _error(term, folder, error) from error
