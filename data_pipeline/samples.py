"""Encoded samples: what training reads, in a folder of their own.

    DIR/manifest.json          schema, fingerprint of what made the samples, number of samples, largest sizes
    DIR/samples.arrayrecord    one safetensors blob per sample
    DIR/empty.safetensors      features of the empty prompt, for classifier-free dropout

Dims: `h` `w` rows and columns of latents, `C` latent channels, `T` text tokens, `E` width of text features.
"""

import json
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Float

from data_pipeline.atomic import write_atomic, write_json_atomic

SCHEMA = 1
MANIFEST, SAMPLES, EMPTY = "manifest.json", "samples.arrayrecord", "empty.safetensors"


@dataclass(frozen=True)
class Text:
    """Features of a prompt's kept tokens, all segments one after the other, and the tokens of each segment."""

    features: Float[np.ndarray, "T E"]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One training sample: normalised latents of the target, its text, and latents of its condition images."""

    latents: Float[np.ndarray, "h w C"]
    text: Text
    conditions: tuple[Float[np.ndarray, "h w C"], ...] = ()


def _encode(arrays: dict[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _encode_text(text: Text) -> dict[str, np.ndarray]:
    return {"text": text.features, "lengths": np.asarray(text.lengths, np.int32)}


def _decode_text(arrays: dict[str, np.ndarray]) -> Text:
    return Text(arrays["text"], tuple(arrays["lengths"].tolist()))


def encode_sample(sample: Sample) -> bytes:
    conditions = {f"condition.{index}": latents for index, latents in enumerate(sample.conditions)}
    return _encode({"latents": sample.latents, **_encode_text(sample.text), **conditions})


def decode_sample(payload: bytes) -> Sample:
    arrays = safetensors.numpy.load(payload)
    count = sum(name.startswith("condition.") for name in arrays)
    conditions = tuple(arrays[f"condition.{index}"] for index in range(count))
    return Sample(arrays["latents"], _decode_text(arrays), conditions)


def write_samples(folder: pathlib.Path, samples: Iterable[Sample], empty: Text, fingerprint: dict[str, Any]) -> None:
    """Writes a folder of samples; the manifest comes last, so a folder without one is incomplete.

    Args:
      folder: replaced if it exists.
      samples: in the order of their index.
      empty: the empty prompt, " " in the published pipeline.
      fingerprint: plain JSON values that say what the samples depend on: weights, preprocessing, data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    count, tokens, segments = 0, 0, np.zeros(0, int)
    writer = ArrayRecordWriter(str(folder / SAMPLES), "group_size:1")
    try:
        for sample in samples:
            writer.write(encode_sample(sample))
            count, tokens = count + 1, max(tokens, sample.latents.shape[0] * sample.latents.shape[1])
            if count == 1:
                segments = np.zeros(len(sample.text.lengths), int)
            segments = np.maximum(segments, sample.text.lengths)
    finally:
        writer.close()
    if not count:
        raise ValueError(f"there are no samples to write to {folder}")
    write_atomic(folder / EMPTY, _encode(_encode_text(empty)))
    sizes = {"tokens": tokens, "text": np.maximum(segments, empty.lengths).tolist()}
    write_json_atomic(
        folder / MANIFEST, {"schema": SCHEMA, "samples": count, "largest": sizes, "fingerprint": fingerprint}
    )


class SampleFolder(Sequence):
    """Samples of a folder by index; safe to read from several threads and processes.

    Args:
      folder: made by `write_samples`.
      fingerprint: what the samples must have been made from; None: anything.

    Raises:
      ValueError: if the folder is incomplete, of another schema, or made from something else (what differs is named).
    """

    def __init__(self, folder: pathlib.Path, fingerprint: dict[str, Any] | None = None):
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} holds no complete samples (no {MANIFEST}); encode the data first")
        manifest = json.loads(path.read_text())
        if manifest.get("schema") != SCHEMA:
            raise ValueError(f"{folder} has samples of schema {manifest.get('schema')!r}, this qi2 reads {SCHEMA}")
        if fingerprint is not None and manifest["fingerprint"] != fingerprint:
            made = manifest["fingerprint"]
            differing = [
                f"{key}: {made.get(key)!r}, expected {fingerprint.get(key)!r}"
                for key in sorted(made.keys() | fingerprint.keys())
                if made.get(key) != fingerprint.get(key)
            ]
            raise ValueError(f"{folder} was encoded from something else; encode again. " + "; ".join(differing))
        self.folder, self._count = folder, manifest["samples"]
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.largest_tokens: int = manifest["largest"]["tokens"]
        self.largest_text: tuple[int, ...] = tuple(manifest["largest"]["text"])
        self.empty = _decode_text(safetensors.numpy.load((folder / EMPTY).read_bytes()))
        self._reader = ArrayRecordReader(str(folder / SAMPLES))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        return decode_sample(self._reader.read([index])[0])

    def __reduce__(self):
        return SampleFolder, (self.folder,)
