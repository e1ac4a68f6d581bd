"""The pipeline components with weights: their configuration, tensor names and files."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qi2_jax.interop import mmdit, qwen3_vl, vae
from qi2_jax.interop.files import read_json
from qi2_jax.interop.tensor_names import NameMap
from qi2_jax.models import tree
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.models.qwen3_vl.model import Qwen3VL
from qi2_jax.models.vae import VAE

# Errors that a hostile or wrong configuration causes in code that reads it or builds a model from it.
_MISFITS = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)


@dataclasses.dataclass(frozen=True)
class Component:
    """A component of the pipeline.

    Attributes:
      published: (library, class) of the published implementation in `model_index.json`.
      stem: name of its published weight files without suffixes.
      model: class of our model.
      read_config: function from the published `config.json` to our config.
      name_map: function from our config to its name map.
    """

    published: tuple[str, str]
    stem: str
    model: Callable[..., Any]
    read_config: Callable[[Mapping[str, Any]], Any]
    name_map: Callable[[Any], NameMap]

    def abstract(self, config: Any) -> Any:
        """The model as shapes without arrays.

        Raises:
          ValueError: if the configuration does not describe a valid model.
        """
        try:
            return jax.eval_shape(lambda: self.model(config, key=jax.random.key(0)))
        except _MISFITS as error:
            raise ValueError(f"no {self.published[1]} can be built from {config}: {_message(error)}") from error

    def expected(self, config: Any) -> dict[str, tuple[int, ...]]:
        """{our name: shape} of all parameters; raises as `abstract`."""
        return {name: tuple(leaf.shape) for name, leaf in tree.to_dict(self.abstract(config)).items()}


COMPONENTS = {
    "transformer": Component(
        ("diffusers", mmdit.CLASS), "diffusion_pytorch_model", MMDiT, mmdit.from_diffusers, lambda config: mmdit.NAMES
    ),
    "vae": Component(("diffusers", vae.CLASS_NAME), "diffusion_pytorch_model", VAE, vae.from_diffusers, vae.name_map),
    "text_encoder": Component(
        ("transformers", qwen3_vl.CLASS), "model", Qwen3VL, Qwen3VLConfig.from_dict, qwen3_vl.name_map
    ),
}


def read_config(folder: pathlib.Path | str, name: str) -> Any:
    """Reads the `config.json` of component `name` in `folder`.

    Raises:
      ValueError: naming the file and the problem.
    """
    path, component = pathlib.Path(folder) / "config.json", COMPONENTS[name]
    values = read_json(path)
    found = values.get("_class_name", component.published[1])
    if found != component.published[1]:
        raise ValueError(f"{path} describes a {found}; the {name} must be a {component.published[1]}")
    try:
        return component.read_config(values)
    except _MISFITS as error:
        raise ValueError(f"{path}: {_message(error)}") from error


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)
