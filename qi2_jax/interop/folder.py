"""Import and export of a published pipeline folder, streaming every tensor from file to file.

Our model folder mirrors the published one: it has the same subfolders with byte-identical configuration, scheduler and
processor files, and one `model.safetensors` per component with our names, stacked layers and the passthrough tensors.
An imported folder can therefore be exported without loss, and each host of a pod reads only its slices.

```
MODEL/qi2.json  model_index.json  scheduler/  processor/
      transformer/{config.json,model.safetensors}  vae/{..}  text_encoder/{..}
```
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.interop import components, files, published_files, stored_weights, tensor_names
from qi2_jax.interop.components import COMPONENTS
from qi2_jax.interop.files import read_json
from qi2_jax.interop.stored_weights import PASSTHROUGH, STEM, FileWeights, Weight, Weights
from qi2_jax.interop.tensors import Writer, size
from qi2_jax.models import tree
from qi2_jax.runtime import outputs
from qi2_jax.runtime.dtypes import CODES
from qi2_jax.sequence import BLOCK_CAUSAL

MARK, INDEX = "qi2.json", "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
VERSION = 1
PIPELINE_CLASS = "QwenImage21Pipeline"
AUXILIARY = ("scheduler", "processor")
COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".model")  # configuration, vocabulary, templates: never code or pickles
MAX_AUXILIARY_BYTES = 64 << 20
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of an import or export.

    Attributes:
      parameters, bytes: counts for each component, passthrough tensors included.
      left_out: files that are neither weights nor configuration.
      unread: weight files without a tensor that was read, such as those of another variant.
    """

    parameters: dict[str, int]
    bytes: dict[str, int]
    left_out: tuple[str, ...]
    unread: tuple[str, ...] = ()


def import_folder(source: pathlib.Path, out: pathlib.Path, variant: str | None = None) -> Report:
    """Turns a published pipeline folder into one of our model folders.

    All components are checked before the first byte is written; peak memory does not depend on the model's size. `out`
    appears when it is complete, see `files.building`.

    Args:
      source: published folder.
      out: folder to create; missing or empty.
      variant: variant of the weights, see `published_files.weights_file`.

    Raises:
      ValueError: for another pipeline, links that lead out of the folder, a component that does not match its
        configuration (all offending tensors are listed), weights that are not safetensors, or an `out` that is not
        empty or lies in `source`.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    check_published(source, variant)
    outputs.check_outside(out, source)
    opened: dict[str, tuple[FileWeights, FileWeights]] = {}
    for name, component in COMPONENTS.items():
        config = components.read_config(source / name, name)
        opened[name] = stored_weights.open_published(
            source / name, component.stem, component.expected(config), component.name_map(config), variant
        )
    copied, left_out = _auxiliary(source)
    with files.building(out, _total(source, opened, copied)) as place, _bar("import", opened) as bar:
        for name, (weights, passthrough) in opened.items():
            write_ours(place / name, weights, passthrough, bar)
        _copy(source, place, copied)
        mark(place)
    return dataclasses.replace(_report(opened, left_out), unread=_unread(source, opened))


def export_folder(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    replace: Mapping[str, Weights] | None = None,
    code: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Turns one of our model folders into a published pipeline folder, which diffusers loads.

    `model_index.json` is written last, because diffusers does not open a folder without it.

    Args:
      source: a folder from `import_folder`, or the model folder of a run.
      out: folder to create; missing or empty.
      replace: weights of components that replace those in the folder, for instance from a checkpoint.
      code: dtype to convert all tensors to, one of `tensors.WEIGHT_DTYPES`; None: as stored.
      max_shard_bytes: size above which a component is split into shards with an index.

    Raises:
      ValueError: as `import_folder`, and if replaced weights do not match the component's configuration.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    outputs.check_outside(out, source)
    check_mark(source)
    check_source(source)
    if components.read_config(source / "transformer", "transformer").attention != BLOCK_CAUSAL:
        raise ValueError(f"{source} has a transformer with bidirectional attention, which diffusers cannot run")
    opened, items = {}, {}
    for name, component in COMPONENTS.items():
        config = components.read_config(source / name, name)
        expected = component.expected(config)
        if replace and name in replace:
            weights, passthrough = replace[name], stored_weights.open_passthrough(source / name)
            shapes = {key: weight.shape for key, weight in weights.items()}
            stored_weights.check_ours(shapes, expected, f"weights of the {name}")
        else:
            weights, passthrough = stored_weights.open_ours(source / name, expected)
        both = (
            (weights, passthrough)
            if code is None
            else (stored_weights.cast(weights, code), stored_weights.cast(passthrough, code))
        )
        opened[name], names = both, component.name_map(config)
        items[name] = _published_items(*both, names)
        tensor_names.check({item.name: item.shape for item in items[name]}, expected, names, str(source / name))
    copied, left_out = _auxiliary(source)
    with files.building(out, _total(source, opened, copied)) as place, _bar("export", opened) as bar:
        for name, component in COMPONENTS.items():
            _write_published(place / name, component.stem, items[name], max_shard_bytes, bar)
        _copy(source, place, copied)
    return _report(opened, left_out)


def write_ours(folder: pathlib.Path, weights: FileWeights, passthrough: FileWeights, bar: Any = None) -> None:
    """Writes the `model.safetensors` of a component, with our names, from tensors in other files."""
    everything = {**weights, **{PASSTHROUGH + name: weight for name, weight in passthrough.items()}}
    specs = {name: (weight.code, weight.shape) for name, weight in everything.items()}
    with Writer(folder / f"{STEM}.safetensors", specs, bar) as writer:
        for name, weight in everything.items():
            offset = 0
            for piece in weight.pieces:
                offset += writer.write(name, piece, offset)


def save_component(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    model: Any = None,
    passthrough: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a component that was trained or created here: its published `config.json` and its model.

    Args:
      folder: folder of the component in a model folder.
      config: content of `config.json`.
      model: parameters to write; None if a run keeps them in checkpoints.
      passthrough: passthrough tensors: published tensors that our model does not use.
    """
    files.write_json(folder / "config.json", config)
    if model is None:
        return
    leaves = tree.to_dict(model) | {PASSTHROUGH + name: array for name, array in (passthrough or {}).items()}
    specs = {name: (CODES[np.dtype(leaf.dtype)], tuple(leaf.shape)) for name, leaf in leaves.items()}
    with Writer(folder / f"{STEM}.safetensors", specs) as writer:
        for name, leaf in leaves.items():
            writer.write(name, np.asarray(leaf))


class _Item(NamedTuple):
    """A published tensor and the weight, or layer of a stacked weight, with its bytes."""

    name: str
    shape: tuple[int, ...]
    source: Weight
    layer: int | None

    @property
    def nbytes(self) -> int:
        return size(self.source.code, self.shape)


def _published_items(weights: Weights, passthrough: Weights, names: tensor_names.NameMap) -> list[_Item]:
    items = [_Item(name, weight.shape, weight, None) for name, weight in passthrough.items()]
    for ours, weight in weights.items():
        for name in names.to_published(ours, weight.shape):
            layer = names.to_ours(name)[1]
            items.append(_Item(name, weight.shape if layer is None else weight.shape[1:], weight, layer))
    return items


def _write_published(folder: pathlib.Path, stem: str, items: list[_Item], max_shard_bytes: int, bar: Any) -> None:
    shards: list[list[_Item]] = [[]]
    for item in items:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + item.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(item)
    count = len(shards)
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        with Writer(folder / name, {item.name: (item.source.code, item.shape) for item in shard}, bar) as writer:
            for item in shard:
                writer.write(item.name, item.source.part(item.layer))
    if count > 1:
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in items)},
            "weight_map": {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard},
        }
        files.write_json(folder / f"{stem}.safetensors.index.json", index)


def _auxiliary(source: pathlib.Path) -> tuple[list[pathlib.Path], tuple[str, ...]]:
    """Relative paths of the files to copy, `model_index.json` last, and of the files to leave out."""
    copied, left_out = [], []
    for parent, _, found in os.walk(source):
        for relative in (pathlib.Path(parent, name).relative_to(source) for name in found):
            is_weights = published_files.is_weights(relative.name)
            is_hidden = any(part.startswith(".") for part in relative.parts)  # metadata of git and of downloads
            if is_weights or is_hidden or relative.name == MARK:
                continue
            wanted = len(relative.parts) == 2 and relative.parts[0] in (*COMPONENTS, *AUXILIARY)
            is_text = relative.suffix in COPIED_SUFFIXES and (source / relative).is_file()
            if (wanted or relative == pathlib.Path(INDEX)) and is_text:
                copied.append(relative)
            else:
                left_out.append(str(relative))
    check_auxiliary(source, copied)
    return sorted(copied, key=lambda path: (path == pathlib.Path(INDEX), path)), tuple(sorted(left_out))


def check_auxiliary(source: pathlib.Path, relative_paths: Iterable[pathlib.Path]) -> None:
    """Raises a ValueError that lists all files that are too large for configuration, vocabulary or a template."""
    large = sorted(str(path) for path in relative_paths if (source / path).stat().st_size > MAX_AUXILIARY_BYTES)
    if large:
        raise ValueError(f"{source}: {large} have more than {MAX_AUXILIARY_BYTES} bytes each")


def _copy(source: pathlib.Path, out: pathlib.Path, relative_paths: list[pathlib.Path]) -> None:
    for relative in relative_paths:
        files.write(out / relative, (source / relative).read_bytes())


def check_published(source: pathlib.Path, variant: str | None = None) -> None:
    """Raises a ValueError unless `source` is a published pipeline folder that can be imported; reads no weights."""
    published_files.check_place(source)
    check_source(source)
    found = {name: published_files.variants(source / name, component.stem) for name, component in COMPONENTS.items()}
    if variant is not None and not any(variant in available for available in found.values()):
        others = sorted({other for available in found.values() for other in available if other})
        raise ValueError(f"no component of {source} has the variant {variant!r}; the variants are {others}")


def _unread(source: pathlib.Path, opened: Mapping[str, tuple[FileWeights, FileWeights]]) -> tuple[str, ...]:
    """Weight files with none of the tensors that were read, such as those of another variant."""
    read = {
        piece.file
        for weights in itertools.chain.from_iterable(opened.values())
        for weight in weights.values()
        for piece in weight.pieces
    }
    files_of = (path for name in opened for path in (source / name).glob("*.safetensors"))
    return tuple(sorted(str(path.relative_to(source)) for path in files_of if path not in read))


def check_source(source: pathlib.Path) -> None:
    """Raises a ValueError unless a folder has the supported pipeline, components and scheduler.

    It must not contain stray links, and its processor files must not be too large to read.
    """
    index = read_json(source / INDEX)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ValueError(
            f"{source / INDEX} describes a {index.get('_class_name')!r}; only {PIPELINE_CLASS} is supported"
        )
    wanted = {name: list(component.published) for name, component in COMPONENTS.items()}
    other = {name: index.get(name) for name, published in wanted.items() if index.get(name) != published}
    if other:
        raise ValueError(f"{source / INDEX} has the components {other}; only {wanted} are supported")
    if not (source / "processor").is_dir():
        raise ValueError(
            f"{source} has no folder processor with the tokenizer and the image processor; {files.contents(source)}"
        )
    files.check_links(source)
    check_auxiliary(source, [path.relative_to(source) for path in (source / "processor").rglob("*") if path.is_file()])
    read_schedule(source)


def read_schedule(folder: pathlib.Path) -> Schedule:
    """The schedule of a published folder or of a model folder.

    Raises:
      ValueError: naming the file, if it is missing, describes an unsupported scheduler, or gives times outside [0, 1].
    """
    values, index = read_json(folder / SCHEDULER), read_json(folder / INDEX)
    try:
        schedule = Schedule.from_diffusers(values, index.get("sample_sigmas"))
        schedule.times(2, 256)  # raises if the values do not give valid times
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{folder / SCHEDULER}, with sample_sigmas of {INDEX}: {error}") from error
    return schedule


def mark(folder: pathlib.Path, scheduler_of: str | None = None) -> None:
    """Marks a model folder as complete.

    Args:
      folder: model folder.
      scheduler_of: path of the model whose scheduler the folder keeps; None: the scheduler belongs to this model.
    """
    record: dict[str, Any] = {"format": "qi2 model folder", "version": VERSION}
    if scheduler_of is not None:
        record["scheduler_of"] = scheduler_of
    files.write(folder / MARK, json.dumps(record).encode() + b"\n")


def check_mark(folder: pathlib.Path) -> None:
    """Raises a ValueError unless `folder` is a complete model folder of the supported version."""
    if not (folder / MARK).is_file():
        raise ValueError(f"{folder} is not a complete model folder (no {MARK}); `qi2 import` makes one")
    version = read_json(folder / MARK).get("version")
    if version != VERSION:
        raise ValueError(f"{folder} has model folder version {version!r}; this qi2 reads version {VERSION}")


def _total(source: pathlib.Path, opened: Mapping[str, tuple[Weights, Weights]], copied: list[pathlib.Path]) -> int:
    """Size of a folder in bytes: tensors and copied files."""
    return sum(_report(opened, ()).bytes.values()) + sum((source / path).stat().st_size for path in copied)


def _bar(title: str, opened: Mapping[str, tuple[Weights, Weights]]) -> tqdm:
    total = sum(_report(opened, ()).bytes.values())
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, dynamic_ncols=True)


def describe(report: Report) -> str:
    """The report as text to print."""
    lines = [
        f"{name}: {count:,} parameters, {report.bytes[name] / 1e9:.3f} GB" for name, count in report.parameters.items()
    ]
    if report.left_out:
        lines.append(f"left out, neither weights nor configuration: {', '.join(report.left_out)}")
    if report.unread:
        lines.append(f"weights that were not read, such as other variants: {', '.join(report.unread)}")
    return "\n".join(lines)


def _report(opened: Mapping[str, tuple[Weights, Weights]], left_out: tuple[str, ...]) -> Report:
    counts, sizes = {}, {}
    for name, (weights, passthrough) in opened.items():
        everything = (*weights.values(), *passthrough.values())
        counts[name] = sum(math.prod(weight.shape) for weight in everything)
        sizes[name] = sum(size(weight.code, weight.shape) for weight in everything)
    return Report(counts, sizes, left_out)
