"""Import and export of a published pipeline folder, streaming every tensor from file to file.

Our model folder mirrors the published one: the same subfolders with the same configuration, scheduler and processor
files to the byte, and one `model.safetensors` per component with our names, stacked layers and the carried tensors. So
an imported folder can be exported again without loss, and each host of a pod reads only its slices.

```
MODEL/qi2.json  model_index.json  scheduler/  processor/
      transformer/{config.json,model.safetensors}  vae/{..}  text_encoder/{..}
```
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from qi2_jax import tree
from qi2_jax.interop import components
from qi2_jax.interop import weights as storage
from qi2_jax.interop.components import COMPONENTS, read_json
from qi2_jax.interop.names import NameMap
from qi2_jax.interop.tensors import CODES, Stored, Writer, size
from qi2_jax.interop.weights import CARRIED, STEM, FileWeight, Weight, Weights

MARK = "qi2.json"
VERSION = 1
PIPELINE_CLASS = "QwenImage21Pipeline"
AUXILIARY = ("scheduler", "processor")
COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".model")  # configuration, vocabulary, templates: never code or pickles
MAX_AUXILIARY_BYTES = 64 << 20
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Report:
    """What an import or export did: parameters and bytes per component, and files that were left out."""

    parameters: dict[str, int]
    bytes: dict[str, int]
    left_out: tuple[str, ...]


def import_folder(source: pathlib.Path, out: pathlib.Path) -> Report:
    """Published pipeline folder -> our model folder.

    Every component is checked before the first byte is written; peak memory does not depend on the model's size.

    Raises:
      ValueError: for another pipeline, a component that does not match its configuration (every offending tensor is
        listed), weights that are not safetensors, or an `out` that is not empty.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    _check_index(source / "model_index.json")
    opened = {}
    for name, component in COMPONENTS.items():
        config = components.read_config(source / name, name)
        opened[name] = storage.of_published(
            source / name, component.stem, component.expected(config), component.name_map(config)
        )
    _check_empty(out)
    left_out = copy_auxiliary(source, out)
    with _bar("import", opened) as bar:
        for name, (weights, carried) in opened.items():
            write_ours(out / name, weights, carried, bar)
    mark(out)
    return _report(opened, left_out)


def export_folder(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    replace: dict[str, Weights] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Our model folder -> published pipeline folder, loadable by diffusers.

    Args:
      source: a folder made by `import_folder` or by a run.
      out: the folder to make; must be empty or missing.
      replace: weights to take for a component instead of the folder's own, for instance a checkpoint's.
      max_shard_bytes: larger components are split into shards with an index.

    Raises:
      ValueError: as `import_folder`.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    check_mark(source)
    opened, maps = {}, {}
    for name, component in COMPONENTS.items():
        config = components.read_config(source / name, name)
        maps[name] = component.name_map(config)
        if replace and name in replace:
            opened[name] = (replace[name], {})
        else:
            opened[name] = storage.of_ours(source / name, component.expected(config))
    _check_empty(out)
    left_out = copy_auxiliary(source, out)
    with _bar("export", opened) as bar:
        for name, (weights, carried) in opened.items():
            _write_published(out / name, COMPONENTS[name].stem, weights, carried, maps[name], max_shard_bytes, bar)
    return _report(opened, left_out)


def write_ours(
    folder: pathlib.Path, weights: Mapping[str, FileWeight], carried: Mapping[str, Stored], bar: Any = None
) -> None:
    """Writes one component's `model.safetensors` with our names, from other files."""
    specs = {name: (weight.code, weight.shape) for name, weight in weights.items()}
    specs |= {CARRIED + name: (stored.code, stored.shape) for name, stored in carried.items()}
    with Writer(folder / f"{STEM}.safetensors", specs, bar) as writer:
        for name, weight in weights.items():
            offset = 0
            for piece in weight.pieces:
                offset += writer.write(name, piece, offset)
        for name, stored in carried.items():
            writer.write(CARRIED + name, stored)


def save_component(
    folder: pathlib.Path, config: Mapping[str, Any], model: Any = None, carried: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes a component that we trained or made: its published `config.json` and, unless None, its model.

    Args:
      folder: the component's folder in a model folder.
      config: the content of the published configuration.
      model: parameters to write; None where a run keeps them in checkpoints.
      carried: published tensors that our model does not use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model is None:
        return
    leaves = tree.to_dict(model) | {CARRIED + name: array for name, array in (carried or {}).items()}
    specs = {name: (CODES[np.dtype(leaf.dtype)], tuple(leaf.shape)) for name, leaf in leaves.items()}
    with Writer(folder / f"{STEM}.safetensors", specs) as writer:
        for name, leaf in leaves.items():
            writer.write(name, np.asarray(leaf))


class _Item(NamedTuple):
    """One published tensor and where its bytes come from."""

    name: str
    code: str
    shape: tuple[int, ...]
    source: Weight | Stored
    layer: int | None

    @property
    def nbytes(self) -> int:
        return size(self.code, self.shape)


def _write_published(folder, stem, weights, carried, names: NameMap, max_shard_bytes, bar) -> None:
    items = [_Item(name, stored.code, stored.shape, stored, None) for name, stored in carried.items()]
    for ours, weight in weights.items():
        for published in names.to_published(ours, weight.shape):
            layer = names.to_ours(published)[1]
            shape = weight.shape if layer is None else weight.shape[1:]
            items.append(_Item(published, weight.code, shape, weight, layer))

    shards: list[list[_Item]] = [[]]
    for item in items:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + item.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(item)
    count = len(shards)
    files = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = [f"{stem}.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        with Writer(folder / file, {item.name: (item.code, item.shape) for item in shard}, bar) as writer:
            for item in shard:
                writer.write(item.name, item.source.part(item.layer))
    if count > 1:
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in items)},
            "weight_map": {item.name: file for file, shard in zip(files, shards, strict=True) for item in shard},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_auxiliary(source: pathlib.Path, out: pathlib.Path) -> tuple[str, ...]:
    """Copies configuration, scheduler and processor files byte for byte; returns the names of what was left out.

    Weights are not copied here, nor is anything that could be code or a pickle, nor what stands behind a link.
    """
    left_out = []
    for path in _files(source):
        relative = path.relative_to(source)
        folder = relative.parts[0] if len(relative.parts) == 2 else None
        wanted = str(relative) == "model_index.json" or folder in (*COMPONENTS, *AUXILIARY)
        if relative.name.endswith((".safetensors", ".safetensors.index.json")) or relative.name == MARK:
            continue
        fits = path.suffix in COPIED_SUFFIXES and path.stat().st_size <= MAX_AUXILIARY_BYTES
        if not wanted or not fits or path.is_symlink():
            left_out.append(str(relative))
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / relative)
    return tuple(sorted(left_out))


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _check_index(path: pathlib.Path) -> None:
    found = read_json(path).get("_class_name")
    if found != PIPELINE_CLASS:
        raise ValueError(f"{path} describes a {found!r}; only {PIPELINE_CLASS} folders can be imported")


def mark(folder: pathlib.Path) -> None:
    """Marks a complete model folder."""
    (folder / MARK).write_text(json.dumps({"format": "qi2 model folder", "version": VERSION}) + "\n")


def check_mark(folder: pathlib.Path) -> None:
    """Raises a ValueError unless `folder` is a complete model folder of a version that we read."""
    if not (folder / MARK).is_file():
        raise ValueError(f"{folder} is not a complete model folder (no {MARK}); `qi2 import` makes one")
    version = read_json(folder / MARK).get("version")
    if version != VERSION:
        raise ValueError(f"{folder} has model folder version {version!r}, this qi2 reads version {VERSION}")


def _check_empty(out: pathlib.Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder; choose another --out")


def _bar(title: str, opened) -> tqdm:
    total = sum(_report(opened, ()).bytes.values())
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, dynamic_ncols=True)


def _report(opened: dict[str, tuple[Weights, dict[str, Stored]]], left_out: tuple[str, ...]) -> Report:
    counts, sizes = {}, {}
    for name, (weights, carried) in opened.items():
        counts[name] = len(weights) + len(carried)
        sizes[name] = sum(size(weight.code, weight.shape) for weight in (*weights.values(), *carried.values()))
    return Report(counts, sizes, left_out)
