"""Adapters of the transformer as one safetensors file that diffusers' `load_lora_weights` reads, and back.

A tensor is called `transformer.` + the published path of its layer + `.lora_A.weight` [rank, in] or `.lora_B.weight`
[out, rank]. The scale stands in the file's header, as diffusers' `save_lora_weights` writes it; where nothing is said,
readers take alpha for equal to rank.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import safe_open

from qi2_jax.interop import files, tensors
from qi2_jax.interop import names as naming
from qi2_jax.interop import weights as storage
from qi2_jax.interop.components import COMPONENTS
from qi2_jax.interop.mmdit import NAMES
from qi2_jax.interop.tensors import CODES, DTYPES, Stored, Writer
from qi2_jax.interop.weights import FileWeight, Weight, Weights
from qi2_jax.models import lora, tree
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiTConfig

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
METADATA = "lora_adapter_metadata"  # the header's key of peft's configuration, each key with the prefix
PEFT_CONFIG = "adapter_config.json"  # where peft itself keeps it
OTHER_KINDS = ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "lora_bias")  # of peft; not read

_NAME = re.compile(
    r"(?:transformer\.|diffusion_model\.|base_model\.model\.)?(.+?)\."
    r"(?:lora_(?P<part>A|B|down|up)(?:\.default)?\.weight|alpha)"
)


def expected(base_config: MMDiTConfig, config: LoRAConfig) -> naming.Shapes:
    """{our name: shape} of every parameter of an adapter.

    Raises:
      ValueError: for targets that match nothing.
    """
    adapter = lora.abstract(COMPONENTS["transformer"].abstract(base_config), config)
    return {name: tuple(leaf.shape) for name, leaf in tree.to_dict(adapter).items()}


def export_lora(adapter: Any, config: LoRAConfig, out: pathlib.Path, code: str | None = None) -> pathlib.Path:
    """Writes an adapter into a folder of its own; equal values give equal bytes.

    Args:
      adapter: an adapter, or its leaves as {our name: array}.
      config: its rank and alpha.
      out: the folder to make; must be empty or missing.
      code: convert to this dtype of safetensors; None: as it is.

    Returns:
      The file, for `pipe.load_lora_weights(file)`.

    Raises:
      ValueError: if `out` is not empty.
    """
    parts: dict[str, np.ndarray] = {}
    modules = set()
    for ours, leaf in tree.to_dict(adapter).items():
        array = np.asarray(leaf) if code is None else np.asarray(leaf).astype(DTYPES[code])
        published = NAMES.to_published(ours, array.shape)
        stacked = NAMES.is_stacked(published[0])
        parts |= {PREFIX + name: array[layer] if stacked else array for layer, name in enumerate(published)}
        modules.add(re.sub(r"^transformer_blocks\.\d+\.", "", published[0].rpartition(".lora_")[0]))
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    values = {"r": config.rank, "lora_alpha": alpha, "target_modules": sorted(modules)}
    metadata = {METADATA: json.dumps({PREFIX + key: value for key, value in values.items()})}
    specs = {name: (CODES[part.dtype], part.shape) for name, part in parts.items()}
    with (
        files.building(out, sum(part.nbytes for part in parts.values())) as place,
        Writer(place / FILE, specs, metadata=metadata) as writer,
    ):
        for name, part in parts.items():
            writer.write(name, part)
    return out / FILE


def read_lora(path: pathlib.Path | str, base_config: MMDiTConfig) -> tuple[LoRAConfig, dict[str, FileWeight]]:
    """An adapter from a file of ours, of diffusers or of peft, also with `lora_down`, `lora_up` and `alpha` tensors.

    Args:
      path: a safetensors file, or a folder with `FILE`.
      base_config: of the transformer that it adapts.

    Returns:
      Its configuration, with every target by its full path, and its weights under our names and in their own dtypes;
      `weights.load(found, lora.abstract(base, config))` makes an adapter of them.

    Raises:
      ValueError: listing every missing, unexpected and misshapen tensor; or for ranks or scales that differ between
        layers, kinds of adapters other than LoRA, or a file that is not safetensors.
    """
    path = pathlib.Path(path)
    path = path / FILE if path.is_dir() else path
    found, alphas = _normalized(path, tensors.scan(path))
    values = _peft_values(path)
    if other := {key: values[key] for key in OTHER_KINDS if values.get(key)}:
        raise ValueError(f"{path} is an adapter with {other}; only LoRA with one rank and one alpha is read")

    layers = lora.linears(COMPONENTS["transformer"].abstract(base_config))
    named = {name: NAMES.to_ours(name)[0].rpartition(".lora_")[0] for name in found}
    targets = tuple(layer for layer in layers if layer in named.values())
    ranks = collections.Counter(found[name].shape[0] for name in found if name.endswith("A.weight"))
    if not targets or not ranks:
        raise ValueError(f"{path} holds no LoRA of this transformer, only {sorted(found)[:8]}; its layers: {[*layers]}")
    rank = ranks.most_common(1)[0][0]
    if values.get("r", rank) != rank:
        raise ValueError(f"{path} has tensors of rank {rank}, but says r {values['r']!r}")
    alphas += [values["lora_alpha"]] if "lora_alpha" in values else []
    if any(alpha != alphas[0] for alpha in alphas):
        raise ValueError(f"{path} has different alphas {alphas}; one for all layers is read")
    try:
        config = LoRAConfig(rank, alphas[0] if alphas else rank, targets)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    wanted = expected(base_config, config)
    naming.check({name: stored.shape for name, stored in found.items()}, wanted, NAMES, str(path))
    weights = {}
    for ours, shape in wanted.items():
        published = NAMES.to_published(ours, shape)
        pieces = tuple(found[name] for name in published)
        if len(codes := {piece.code for piece in pieces}) > 1:
            raise ValueError(f"{path}: the layers of {ours} have different dtypes {sorted(codes)}")
        weights[ours] = FileWeight(pieces, stacked=NAMES.is_stacked(published[0]))
    return config, weights


def _normalized(path: pathlib.Path, stored: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[Any]]:
    """Tensors by published path and peft's names for A and B, and the values of all `alpha` tensors."""
    found: dict[str, Stored] = {}
    alphas: list[Any] = []
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match and match["part"] is None:
            if tensor.nbytes > 8 or len(values := tensor.open().reshape(-1)) != 1:
                raise ValueError(f"{path}: {name} has the shape {tensor.shape}; an alpha is one number")
            alphas.append(float(values[0]))
            continue
        if match:
            name = f"{match[1]}.lora_{'A' if match['part'] in ('A', 'down') else 'B'}.weight"
        if name in found:
            raise ValueError(f"{path} holds {name} twice, under different prefixes")
        found[name] = tensor
    return found, alphas


def _peft_values(path: pathlib.Path) -> dict[str, Any]:
    """peft's configuration in a file's header, or else beside it; empty if there is none."""
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        beside = path.with_name(PEFT_CONFIG)
        return files.read_json(beside) if beside.is_file() else {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {METADATA} in its header is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {METADATA} in its header is a {type(values).__name__}, not an object")
    return {key.removeprefix(PREFIX): value for key, value in values.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class MergedWeight:
    """`W + scale * B A` in fp32, computed for the part that is read; a `qi2_jax.interop.weights.Weight`."""

    weight: Weight
    a: np.ndarray
    b: np.ndarray
    scale: float
    code: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        *stack, rows, columns = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        a, b = self.a[(*stack, slice(None), columns)], self.b[(*stack, rows)]
        values = self.weight.read(index, np.float32)
        for layer in np.ndindex(a.shape[:-2]):  # one at a time: all changes at once would be as large as the model
            values[layer] += np.float32(self.scale) * (b[layer] @ a[layer])
        return values if dtype is None else values.astype(dtype)

    def part(self, layer: int | None) -> np.ndarray:
        return self.read() if layer is None else self.read((slice(layer, layer + 1),))[0]


def merged(base: Weights, adapter: Mapping[str, np.ndarray], config: LoRAConfig) -> dict[str, Weight]:
    """Weights of a full model in fp32, whatever the base's are stored in; each is computed as it is read.

    Args:
      base: every parameter of the transformer.
      adapter: {our name: array} of the adapter.
      config: its scale.
    """
    result: dict[str, Weight] = dict(storage.cast(base, "F32"))
    arrays = {name: np.asarray(array, np.float32) for name, array in adapter.items()}
    for layer in sorted({name.rpartition(".lora_")[0] for name in arrays}):
        a, b = (arrays[f"{layer}.lora_{part}.weight"] for part in "AB")
        result[f"{layer}.weight"] = MergedWeight(base[f"{layer}.weight"], a, b, config.scale)
    return result
