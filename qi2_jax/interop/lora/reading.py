"""From an adapter's file or folder to the low-rank changes of our transformer's matrices."""

import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qi2_jax.interop import tensors
from qi2_jax.interop.lora import formats
from qi2_jax.interop.lora.merging import Change
from qi2_jax.interop.lora.settings import CONFIG_FILE, Settings, check_alpha, read_settings
from qi2_jax.interop.lora.targets import Targets, targets
from qi2_jax.interop.tensors import Stored
from qi2_jax.models.mmdit import MMDiTConfig

FILE = "pytorch_lora_weights.safetensors"  # in a folder of diffusers
PEFT_FILE = "adapter_model.safetensors"
ALPHA_DTYPES = ("I32", "I64")  # dtypes of an alpha, besides those of weights
MAX_LINES = 30  # problems in one message


class Named(NamedTuple):
    """A tensor and its name in the file, for messages."""

    name: str
    stored: Stored


# {published path of a layer: {"A", "B", "alpha": its tensor}}
Layers = dict[str, dict[str, Named]]


def is_adapter(path: pathlib.Path | str) -> bool:
    """Whether a path is an adapter's file or folder rather than a model's; nothing is opened."""
    path = pathlib.Path(path)
    if path.is_dir():
        named = any((path / name).is_file() for name in (FILE, PEFT_FILE, CONFIG_FILE))
        is_model = any((path / name).is_file() for name in ("config.json", "model_index.json"))
        return named or (not is_model and any(path.glob("*.safetensors")))
    return path.is_file() or path.suffix == ".safetensors"


def read(path: pathlib.Path | str, base_config: MMDiTConfig) -> dict[str, dict[int | None, Change]]:
    """The changes that an adapter makes to a transformer (`merging.Changes`).

    Args:
      path: a safetensors file, or a folder that diffusers or peft wrote.
      base_config: configuration of the transformer that is adapted.

    Returns:
      {our path of a layer: {index in its stack: its change}}, in fp32. Layers and blocks that the adapter does not
      change are absent.

    Raises:
      ValueError: naming every tensor that is not part of a plain LoRA of this transformer, lacks its other factor, or
        has an unusable shape or value; or if the file is not a complete safetensors file.
    """
    path = _file(pathlib.Path(path))
    stored = tensors.scan(path, (*tensors.WEIGHT_DTYPES, *ALPHA_DTYPES))
    existing = targets(base_config)
    layers = _by_layer(path, stored, existing)
    is_peft = path.name == PEFT_FILE or any(name.startswith(formats.PEFT_PREFIX) for name in stored)
    settings = read_settings(path, peft=is_peft)
    _check_shapes(path, layers, existing)
    if is_peft and settings is None and not all("alpha" in parts for parts in layers.values()):
        raise ValueError(f"{path} was written by peft, which keeps the scale in {CONFIG_FILE}; put that file beside it")
    result: dict[str, dict[int | None, Change]] = {}
    changed_by: dict[tuple[str, int | None], str] = {}
    for published, parts in layers.items():
        a, b = (_values(path, parts[role]) for role in "AB")
        scale, start = _scale(path, published, parts, settings), 0
        for matrix in existing[published]:
            rows = slice(start, start + matrix.shape[0])
            other = changed_by.setdefault((matrix.path, matrix.layer), published)
            if other != published:
                raise ValueError(f"{path} changes {other} twice: by its own tensors, and by those of {published}")
            result.setdefault(matrix.path, {})[matrix.layer] = Change(a, b[rows], scale)
            start = rows.stop
    return result


def _file(path: pathlib.Path) -> pathlib.Path:
    """The safetensors file of an adapter.

    Raises:
      ValueError: if there is none, or several that could be meant.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give the .safetensors file of an adapter, or its folder")
        return path
    found = [path / name for name in (FILE, PEFT_FILE) if (path / name).is_file()]
    found = found or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(
            f"{path} has {[file.name for file in found] or 'no .safetensors file'}; name the file of one adapter"
        )
    return found[0]


def _by_layer(path: pathlib.Path, stored: Mapping[str, Stored], existing: Targets) -> Layers:
    """Groups tensors by their layers. Raises a ValueError if a tensor belongs to none."""
    flat, layers, problems = formats.flattened(existing), Layers(), []
    for name, tensor in stored.items():
        try:
            layer, role = formats.parse(name, existing, flat)
        except formats.NotReadError as error:
            problems.append(f"{name[: formats.MAX_NAME]} {error}")
            continue
        parts = layers.setdefault(layer, {})
        if role in parts:
            problems.append(f"{name} and {parts[role].name} are the same tensor under two names")
        elif role != "alpha" and tensor.code in ALPHA_DTYPES:
            problems.append(f"{name} has the dtype {tensor.code}; factors have one of {tensors.WEIGHT_DTYPES}")
        parts.setdefault(role, Named(name, tensor))
    for layer, parts in layers.items():
        first = next(iter(parts.values())).name
        problems += [f"{first} has no factor {role} of {layer} beside it" for role in "AB" if role not in parts]
    if not layers and not problems:
        problems = ["it has no tensors"]
    hint = "" if layers else f"\nThe transformer has layers such as {[*existing][:6]}"
    _refuse(path, problems, hint)
    return layers


def _check_shapes(path: pathlib.Path, layers: Layers, existing: Targets) -> None:
    """Compares the shapes of all factors with each other and with their layers."""
    problems = []
    for layer, parts in layers.items():
        out_dim, in_dim = sum(matrix.shape[0] for matrix in existing[layer]), existing[layer][0].shape[1]
        a, b = parts["A"], parts["B"]
        for part, wanted in ((a, ("rank", in_dim)), (b, (out_dim, "rank"))):
            shape = part.stored.shape
            fits = len(shape) == 2 and all(want in ("rank", have) for want, have in zip(wanted, shape, strict=True))
            if not fits or 0 in shape:
                text = ", ".join(map(str, wanted))
                problems.append(f"{part.name} has the shape {shape}; {layer} needs [{text}] with a rank of at least 1")
        if len(a.stored.shape) == len(b.stored.shape) == 2 and a.stored.shape[0] != b.stored.shape[1]:
            ranks = f"{a.stored.shape[0]} and {b.stored.shape[1]}"
            problems.append(f"{a.name} and {b.name} have different ranks, {ranks}")
        if "alpha" in parts and math.prod(parts["alpha"].stored.shape) != 1:
            alpha = parts["alpha"]
            problems.append(f"{alpha.name} has the shape {alpha.stored.shape}; an alpha is one number")
    _refuse(path, problems)


def _scale(path: pathlib.Path, layer: str, parts: Mapping[str, Named], settings: Settings | None) -> float:
    """Scale of a layer's change, by its alpha tensor or the configuration; 1 where neither gives one."""
    rank = parts["A"].stored.shape[0]
    configured = None if settings is None else settings.scale(layer, rank)
    if "alpha" not in parts:
        return 1.0 if configured is None else configured
    alpha = float(parts["alpha"].stored.open().reshape(-1)[0])
    check_alpha(alpha, f"{path}: {parts['alpha'].name}")
    scale = alpha / rank
    if configured is not None and not math.isclose(scale, configured, rel_tol=2**-8):  # an alpha may be in bf16
        assert settings is not None
        raise ValueError(
            f"{path}: {parts['alpha'].name} gives the scale {scale:g}, but {settings.where} gives {configured:g}"
        )
    return scale


def _values(path: pathlib.Path, part: Named) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = np.array(part.stored.open(), np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: {part.name} has values that are not finite in float32")
    return values


def _refuse(path: pathlib.Path, problems: list[str], hint: str = "") -> None:
    if problems:
        more = f"\n  and {len(problems) - MAX_LINES} more" if len(problems) > MAX_LINES else ""
        raise ValueError(
            f"{path} cannot be merged into this transformer:\n  " + "\n  ".join(problems[:MAX_LINES]) + more + hint
        )
