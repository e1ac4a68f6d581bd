"""Encoded samples: what training reads, each stored as one safetensors blob.

Dims: `h` `w` rows and columns of latents, `C` latent channels, `T` text tokens, `E` width of text features.
"""

from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float, UInt8

from qi2_jax.runtime.dtypes import DTYPES

# What training computes in every step instead of reading from the samples: nothing, text features, or latents as well.
NOTHING, TEXT, TEXT_AND_IMAGES = ONLINE = "nothing", "text", "text_and_images"


@dataclass(frozen=True)
class Text:
    """Features of a prompt's kept tokens, and the number of tokens in each segment.

    If the features have no width, training computes them from the prompt. Caches up to schema 4 store prompts only in
    that case.
    """

    features: Float[np.ndarray, "T E"]
    lengths: tuple[int, ...]
    prompt: str | None = None


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
      latents: normalised latents of the target. If `target_pixels` is set, the sample's latents have no channels, and
        training computes them.
      texts: one text per selected caption or instruction.
      conditions: latents of the condition images, in order.
      empty: for an edit, the empty prompt with the same condition images, for classifier-free dropout.
      record: position of the record in its folder.
      condition_pixels: condition images as the encoders read them, 0..255, if training computes text features.
      target_pixels: target as the autoencoder reads it, 0..255, if training computes latents.
    """

    latents: Float[np.ndarray, "h w C"]
    texts: tuple[Text, ...]
    conditions: tuple[Float[np.ndarray, "_ _ C"], ...] = ()
    empty: Text | None = None
    record: int = 0
    condition_pixels: tuple[UInt8[np.ndarray, "_ _ c"], ...] = ()
    target_pixels: UInt8[np.ndarray, "H W c"] | None = None

    def __post_init__(self) -> None:
        assert self.texts and bool(self.conditions) == (self.empty is not None)
        assert all(len(text.lengths) == len(self.conditions) + 1 for text in self.all_texts)
        assert self.target_pixels is None or len(self.condition_pixels) == len(self.conditions)

    @property
    def all_texts(self) -> tuple[Text, ...]:
        return self.texts if self.empty is None else (*self.texts, self.empty)


def encode_sample(sample: Sample) -> bytes:
    """Encodes a sample for storage. Equal samples give equal bytes."""
    arrays = {"latents": sample.latents, "record": np.asarray([sample.record], np.int64)}
    arrays |= {f"condition.{index}": latents for index, latents in enumerate(sample.conditions)}
    arrays |= {f"text.{index}": text.features for index, text in enumerate(sample.all_texts)}
    arrays["lengths"] = np.asarray([text.lengths for text in sample.all_texts], np.int32)
    arrays |= {f"picture.{index}": pixels for index, pixels in enumerate(sample.condition_pixels)}
    arrays |= {} if sample.target_pixels is None else {"target": sample.target_pixels}
    for index, text in enumerate(sample.all_texts):
        arrays |= _prompt_array(f"prompt.{index}", text)
    return encode_arrays(arrays)


def decode_sample(payload: bytes) -> Sample:
    """Decodes a stored sample; its arrays are views of one buffer.

    Raises:
      ValueError: if the payload is not a stored sample.
    """
    arrays = decode_arrays(payload)
    try:
        lengths = [tuple(row) for row in arrays["lengths"].tolist()]
        texts = [
            Text(arrays[f"text.{index}"], row, _read_prompt(f"prompt.{index}", arrays))
            for index, row in enumerate(lengths)
        ]
        conditions = tuple(arrays[f"condition.{index}"] for index in range(len(lengths[0]) - 1))
        empty = texts.pop() if conditions else None
        indices = range(len(conditions)) if "picture.0" in arrays else ()
        pixels = tuple(arrays[f"picture.{index}"] for index in indices)
        record, target = arrays["record"].item(), arrays.get("target")
        return Sample(arrays["latents"], tuple(texts), conditions, empty, record, pixels, target)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"a stored sample lacks {error}: it was written by another version, or is not a sample"
        ) from None


def encode_text(text: Text) -> bytes:
    return encode_arrays(
        {"text": text.features, "lengths": np.asarray(text.lengths, np.int32)} | _prompt_array("prompt", text)
    )


def decode_text(payload: bytes) -> Text:
    arrays = decode_arrays(payload)
    return Text(arrays["text"], tuple(arrays["lengths"].tolist()), _read_prompt("prompt", arrays))


def _prompt_array(name: str, text: Text) -> dict[str, np.ndarray]:
    return {} if text.prompt is None else {name: np.frombuffer(text.prompt.encode(), np.uint8)}


def _read_prompt(name: str, arrays: dict[str, np.ndarray]) -> str | None:
    return arrays[name].tobytes().decode() if name in arrays else None


def encode_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decode_arrays(payload: bytes) -> dict[str, np.ndarray]:
    """Decodes the arrays of a safetensors blob, including bfloat16, which `safetensors.numpy` does not read.

    Raises:
      ValueError: if the payload is not safetensors, or has a dtype outside `DTYPES`.
    """
    try:
        parts = safetensors.deserialize(payload)
        return {name: np.frombuffer(part["data"], DTYPES[part["dtype"]]).reshape(part["shape"]) for name, part in parts}
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"a stored sample is not readable: {error!r}") from None
