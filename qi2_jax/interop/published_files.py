"""Published folders as people have them: which weight files to read, and what is wrong with a folder.

Hugging Face libraries name the files of a variant such as fp16 in two ways: `STEM.fp16.safetensors`, and for shards
`STEM.fp16-00001-of-00002.safetensors` with the index `STEM.safetensors.index.fp16.json`.
"""

import os
import pathlib
import re

from qi2_jax.interop.files import contents, read_json

INDEX = "model_index.json"
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
LFS_POINTER = b"version https://git-lfs.github.com/"
_SHARD = re.compile(r".*-\d{5}-of-\d{5}")
_WEIGHTS = re.compile(r".*(\.safetensors|\.(safetensors|bin)\.index(\.[\w-]+)?\.json)")


def is_weights(name: str) -> bool:
    """Whether a file name is that of safetensors weights, or of an index of shards."""
    return _WEIGHTS.fullmatch(name) is not None


def variants(folder: pathlib.Path, stem: str) -> dict[str, list[pathlib.Path]]:
    """The weight files of a component by variant ("" is the default): a single file, an index of shards, or both."""
    name = re.escape(stem)
    single = re.compile(rf"{name}(?:\.(?P<variant>[\w-]+))?\.safetensors")
    index = re.compile(
        rf"{name}\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json|"
        rf"{name}\.(?P<early>[\w-]+)\.safetensors\.index\.json"
    )
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = single.fullmatch(path.name) or index.fullmatch(path.name)
        if match and path.is_file():
            variant = match["variant"] or match.groupdict().get("early") or ""
            if not _SHARD.fullmatch(variant):
                found.setdefault(variant, []).append(path)
    return found


def weights_file(folder: pathlib.Path, stem: str, variant: str | None = None) -> pathlib.Path:
    """The single weight file of a component, or the index of its shards.

    Args:
      folder: folder of the component.
      stem: name of its weight files without suffixes.
      variant: variant to read; a component without it is read in its default, as diffusers does. None: the
        default or, if there is none, the only variant.

    Raises:
      ValueError: if there are no safetensors weights, several variants and no choice, or a single file beside an index.
    """
    found = variants(folder, stem)
    if variant in found:
        chosen = found[variant]
    elif "" in found:
        chosen = found[""]
    elif variant is None and len(found) == 1:
        (chosen,) = found.values()
    elif found:
        missing = "" if variant is None else f", but not {variant!r}"
        raise ValueError(
            f"{folder} has the variants {sorted(found)}{missing}; choose one with --variant of `qi2 import`, or keep "
            "the files of one variant only"
        )
    else:
        raise ValueError(_explain_missing(folder, stem))
    if len(chosen) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in chosen)}; remove the outdated one")
    return chosen[0]


def _explain_missing(folder: pathlib.Path, stem: str) -> str:
    """Why a folder has no weights that can be read, and what it has instead."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shards = [name for name in names if name.startswith(stem) and _SHARD.fullmatch(name.removesuffix(".safetensors"))]
    message = f"{folder} has neither {stem}.safetensors nor {stem}.safetensors.index.json"
    if shards:
        return f"{message}: the index of the shards {shards} is missing; download it as well"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return (
            f"{message}; only safetensors weights are read. {pickles} can run code when opened: save the model again "
            "as safetensors (`save_pretrained` with `safe_serialization=True`)"
        )
    if broken := [name for name in names if (folder / name).is_symlink() and not (folder / name).exists()]:
        return f"{message}: the links {broken} lead nowhere; download the files again"
    return f"{message}; {contents(folder)}"


def check_place(source: pathlib.Path) -> None:
    """Raises a ValueError unless `source` can be a published pipeline folder, saying what it is instead."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise ValueError(f"{source} {what}; give the folder of a Qwen-Image-2.1 pipeline, with {INDEX}")
    if (source / "qi2.json").is_file():
        raise ValueError(f"{source} is a model folder already; `qi2 sample`, `edit` and `export` read it as it is")
    if not (source / INDEX).is_file():
        raise ValueError(f"{source / INDEX} does not exist: {_what_is_it(source)}")
    incomplete = [
        f"{path.relative_to(source)} ({reason})"
        for parent, _, names in os.walk(source)
        for path in (pathlib.Path(parent, name) for name in sorted(names))
        if not any(part.startswith(".") for part in path.relative_to(source).parts) and (reason := _incomplete(path))
    ]
    if incomplete:
        raise ValueError(f"{source} was not downloaded completely: {', '.join(incomplete)}; download these files again")


def _what_is_it(source: pathlib.Path) -> str:
    snapshots = sorted((source / "snapshots").glob("*")) or sorted(source.glob("models--*/snapshots/*"))
    if snapshots:
        return f"{source} is a cache of the Hugging Face hub; give a snapshot in it: {', '.join(map(str, snapshots))}"
    if (source / "config.json").is_file():
        values = read_json(source / "config.json")
        name = values.get("_class_name") or values.get("architectures") or values.get("model_type")
        return f"{source} is a single model ({name}); give the folder of the whole pipeline, with {INDEX}"
    if nested := sorted(path.parent for path in source.glob(f"*/{INDEX}")):
        return f"it is in {', '.join(map(str, nested))}; give that folder"
    return contents(source)


def _incomplete(path: pathlib.Path) -> str | None:
    """Why a file is an incomplete download; None if it is complete."""
    if path.is_symlink() and not path.exists() and os.path.realpath(path) != str(path.absolute()):
        return f"a link to {os.readlink(path)}, which does not exist"
    if path.suffix in (".incomplete", ".part", ".crdownload", ".aria2"):
        return "a partial download"
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
        return "a Git LFS pointer instead of the file; run `git lfs pull`"
    return None
