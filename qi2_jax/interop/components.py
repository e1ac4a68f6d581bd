"""The components of a pipeline that hold weights: how each is configured, named and stored."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qi2_jax import tree
from qi2_jax.interop import mmdit, qwen3_vl, vae
from qi2_jax.interop.names import NameMap
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from qi2_jax.models.vae import VAE


@dataclasses.dataclass(frozen=True)
class Component:
    """One component.

    Attributes:
      stem: of its published weight files.
      model: the class of our model.
      read_config: published `config.json` -> our config.
      name_map: our config -> its name map.
    """

    stem: str
    model: Callable[..., Any]
    read_config: Callable[[Mapping[str, Any]], Any]
    name_map: Callable[[Any], NameMap]

    def abstract(self, config: Any) -> Any:
        """The model without memory."""
        return jax.eval_shape(lambda: self.model(config, key=jax.random.key(0)))

    def expected(self, config: Any) -> dict[str, tuple[int, ...]]:
        """{our name: shape} of every parameter."""
        return {name: tuple(leaf.shape) for name, leaf in tree.to_dict(self.abstract(config)).items()}


COMPONENTS = {
    "transformer": Component("diffusion_pytorch_model", MMDiT, mmdit.from_diffusers, lambda config: mmdit.NAMES),
    "vae": Component("diffusion_pytorch_model", VAE, vae.from_diffusers, vae.name_map),
    "text_encoder": Component("model", Qwen3VL, Qwen3VLConfig.from_dict, lambda config: qwen3_vl.NAMES),
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: naming the file, if it is missing or not a JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def read_config(folder: pathlib.Path, name: str) -> Any:
    """Our configuration of component `name` stored in `folder`."""
    try:
        return COMPONENTS[name].read_config(read_json(folder / "config.json"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
