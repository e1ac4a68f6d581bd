"""Published autoencoders, which a separate Python process with PyTorch and diffusers computes.

The configuration is read and checked here; `qi2_torch.autoencoder` builds the model and answers one batch at a time.
That process imports this module, which therefore does not import JAX.

Dims: `B` images, `H` `W` pixels.
"""

import contextlib
import dataclasses
import importlib.util
import pathlib
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

from qi2_jax.interop import files, published_files
from qi2_jax.runtime import digests

STEM = "diffusion_pytorch_model"
SHAPE = struct.Struct("<III")  # images, height and width, in front of the pixels of a batch
MAX_ERROR_TEXT = 3000  # characters of a failed process's output


@dataclasses.dataclass(frozen=True)
class Kind:
    """Where the configuration of a class has its factor and latent channels.

    Attributes:
      levels: key of a list with one entry per level; its length decides the factor.
      num_levels: length of that list by default.
      halvings: difference between the number of levels and that of halvings of the resolution.
      channels: key of the latent channels, and their number by default.
    """

    levels: str
    num_levels: int
    halvings: int
    channels: tuple[str, int]


KINDS = {
    "AutoencoderKL": Kind("block_out_channels", 1, 1, ("latent_channels", 4)),
    "AutoencoderKLQwenImage": Kind("temperal_downsample", 3, 0, ("z_dim", 16)),
    "AutoencoderKLQwenImage21": Kind("temperal_downsample", 4, 0, ("z_dim", 64)),
    "AutoencoderDC": Kind("encoder_block_out_channels", 6, 1, ("latent_channels", 32)),
}
MAX_LEVELS, MAX_CHANNELS, MAX_PATCH = 8, 4096, 16


@dataclasses.dataclass(frozen=True)
class TorchAutoencoder:
    """A published autoencoder, not loaded yet.

    Attributes:
      name: name in tables.
      folder: folder with `config.json` and safetensors weights.
      kind: its class in diffusers, a key of `KINDS`.
      factor: pixels per latent along height and width.
      channels: latent channels.
    """

    name: str
    folder: pathlib.Path
    kind: str
    factor: int
    channels: int

    @property
    def digest(self) -> str:
        """SHA-256 of the safetensors files; for a single one, that of the file."""
        return digests.of_weights(sorted(self.folder.glob(f"{STEM}*.safetensors")))

    @contextlib.contextmanager
    def loaded(self) -> Iterator["LoadedTorchAutoencoder"]:
        """The model in a process of its own, which ends with the context."""
        command = [sys.executable, "-m", "qi2_torch.autoencoder", str(self.folder.resolve()), self.kind]
        with tempfile.TemporaryFile() as errors:
            pipe = subprocess.PIPE
            with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors) as process:
                try:
                    yield LoadedTorchAutoencoder(self.folder, process, errors)
                finally:
                    process.kill()
                    with contextlib.suppress(BrokenPipeError):  # of a batch that a failed process did not read
                        process.stdin.close()  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class LoadedTorchAutoencoder:
    """A published autoencoder in a running process.

    Attributes:
      folder: folder of the model.
      process: process that answers batches.
      errors: its messages.
    """

    folder: pathlib.Path
    process: subprocess.Popen
    errors: IO[bytes]

    def reconstruct(self, images_BHWc: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
        """See `autoencoders.Reconstructs`.

        Raises:
          ValueError: with the end of the process's messages if it fails.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(SHAPE.pack(*images_BHWc.shape[:3]) + images_BHWc.tobytes())
            self.process.stdin.flush()
        answer = self.process.stdout.read(images_BHWc.nbytes)
        if len(answer) < images_BHWc.nbytes:
            self.process.wait()
            self.errors.seek(0)
            text = self.errors.read().decode(errors="replace")
            raise ValueError(f"diffusers could not run {self.folder}:\n{text[-MAX_ERROR_TEXT:]}")
        return np.frombuffer(answer, np.uint8).reshape(images_BHWc.shape)


def has_weights(folder: pathlib.Path) -> bool:
    """Whether a folder has weights under the name that diffusers gives them, or another format of them."""
    return folder.is_dir() and any(folder.glob(f"{STEM}*"))


def missing_packages() -> list[str]:
    """The packages that the process needs and that are not installed."""
    return [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]


def find(name: str, folder: pathlib.Path) -> TorchAutoencoder:
    """Checks the folder of a published autoencoder.

    Args:
      name: name in tables.
      folder: folder with `config.json` and weights.

    Raises:
      ValueError: if its class is not supported, its sizes are out of range, it has no safetensors weights, or its links
        lead out of it; or if torch or diffusers are not installed.
    """
    files.check_links(folder)
    path = folder / "config.json"
    values = files.read_json(path)
    kind = values.get("_class_name")
    if kind not in KINDS:
        raise ValueError(f"{path} describes a {kind!r}; supported autoencoders are {', '.join(KINDS)}")
    if "quantization_config" in values:
        raise ValueError(f"{path} has a quantization_config; give a folder with weights in fp32, bf16 or fp16")
    published_files.weights_file(folder, STEM)
    if missing := missing_packages():
        raise ValueError(f"{folder} needs {missing}; pip install -r requirements-dev.txt")
    return TorchAutoencoder(name, folder, kind, *_sizes(KINDS[kind], values, path))


def _sizes(kind: Kind, values: Mapping[str, Any], path: pathlib.Path) -> tuple[int, int]:
    """Factor and latent channels."""
    levels = values.get(kind.levels, [0] * kind.num_levels)
    if not isinstance(levels, list) or not 0 <= len(levels) - kind.halvings <= MAX_LEVELS:
        raise ValueError(f"{path}: {kind.levels} is {levels!r}; it must be a list of at most {MAX_LEVELS} entries")
    key, default = kind.channels
    channels = values.get(key, default)
    if type(channels) is not int or not 0 < channels <= MAX_CHANNELS:
        raise ValueError(f"{path}: {key} is {channels!r}; it must be an integer from 1 to {MAX_CHANNELS}")
    patch = values.get("patch_size") or 1
    if type(patch) is not int or not 0 < patch <= MAX_PATCH:
        raise ValueError(f"{path}: patch_size is {patch!r}; it must be an integer from 1 to {MAX_PATCH}")
    return patch * 2 ** (len(levels) - kind.halvings), channels
