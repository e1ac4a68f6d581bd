"""Edits that are spoilt on purpose, each in one way, with the expected reason of selection."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from data_pipeline.decoding.images import decode_image
from data_pipeline.records.schema import Caption, Record
from qi2_jax.pixels import over_white


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def spoilt(record: Record, other: Record, rng: np.random.Generator) -> Iterator[tuple[str, str, Record]]:
    """(damage, expected reason, spoilt record) for every kind of damage that applies to an edit.

    Args:
      record: the edit to spoil.
      other: an edit of another scene.
      rng: source of the amounts of damage.
    """
    target = over_white(decode_image(record.image).image)
    source = over_white(decode_image(record.conditions[0]).image)
    local, whole = "edit/local" in record.tags, "edit/global" in record.tags
    if len(record.conditions) == 1:
        yield "target is the source", "nothing_changes", replace(record, image=record.conditions[0])
    if local:
        again = encode(source, "JPEG", quality=85)
        yield "target is the source, recompressed", "nothing_changes", replace(record, image=again)
    if local or whole:
        stranger = ImageOps.fit(over_white(decode_image(other.image).image), target.size)
        yield "source of another scene", "other_scene", replace(record, conditions=(encode(stranger),))
        squeezed = target.resize((round(target.width * 0.9), target.height))
        yield "target squeezed", "other_shape", replace(record, image=encode(squeezed))
        yield "target shifted", "shifted", replace(record, image=encode(shifted(target, rng)))
    if local:
        yield "everything in another tone", "everything_changes", replace(record, image=encode(retoned(target, rng)))
        for name, image in (
            ("unchanged region noisy", noisy(target, rng)),
            ("unchanged region as JPEG 8", encode(target, "JPEG", quality=8)),
            ("unchanged region as JPEG 20", encode(target, "JPEG", quality=20)),
            ("unchanged region blurred", target.filter(ImageFilter.GaussianBlur(max(target.size) / 120))),
        ):
            data = image if isinstance(image, bytes) else encode(image)
            yield name, "unchanged_region_differs", replace(record, image=data)
    if "edit/compose" in record.tags:
        count = len(record.conditions)
        beyond = [re.sub(rf"((?:image |Image |图)){count}", rf"\g<1>{count + 1}", c.text) for c in record.captions]
        yield "a source that is not there", "names_missing_source", with_texts(record, beyond)
        unnamed = [re.sub(r"(?:image |Image |图)1", "it", c.text) for c in record.captions]
        yield "a source that is not named", "source_not_named", with_texts(record, unnamed)
        twice = (record.conditions[0], *record.conditions[:-1])
        yield "a source given twice", "repeated_source", replace(record, conditions=twice)
    swapped = {"en": "ru", "zh-Hans": "en"}
    captions = tuple(replace(c, language=swapped[c.language or ""]) for c in record.captions)
    yield "another language than claimed", "other_script", replace(record, captions=captions)


def compressed(record: Record) -> Record:
    """The same edit as JPEG files, like most real data. It is not spoilt."""
    files = [over_white(decode_image(data).image) for data in (record.image, *record.conditions)]
    image, *conditions = (encode(file, "JPEG", quality=95 if place else 90) for place, file in enumerate(files))
    return replace(record, image=image, conditions=tuple(conditions))


def with_texts(record: Record, texts: list[str]) -> Record:
    return replace(
        record,
        captions=tuple(Caption(t, c.kind, c.language) for t, c in zip(texts, record.captions, strict=True)),
    )


def shifted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image moved by 1% to 4% of its longer side, with its edge repeated."""
    far = max(2, round(max(image.size) * rng.uniform(0.01, 0.04)))
    angle = rng.uniform(0, 2 * np.pi)
    down, right = round(far * np.sin(angle)), round(far * np.cos(angle))
    pixels = np.pad(np.asarray(image), ((far, far), (far, far), (0, 0)), "edge")
    top, left = far - down, far - right
    return Image.fromarray(pixels[top : top + image.height, left : left + image.width])


def retoned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    tint = rng.permutation([90, 30, -60])
    return Image.fromarray((0.6 * pixels + 0.4 * (255 - pixels[..., ::-1]) + tint).clip(0, 255).astype(np.uint8))


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    return Image.fromarray((pixels + rng.normal(0, rng.uniform(8, 14), pixels.shape)).clip(0, 255).astype(np.uint8))
