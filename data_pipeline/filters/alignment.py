"""Image-text alignment: how well each caption fits its image, according to a CLIP or SigLIP from a folder.

Scores of different models are not comparable: cosines of good pairs are around 0.3 for CLIP and around 0.1 for SigLIP.
Scores therefore carry the digest of the weights, and percentiles are safer thresholds than fixed cosines.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold
from qi2_jax.pixels import over_white
from qi2_jax.runtime.digests import of_file

BATCH = 32  # images or texts per batch; smaller batches are padded to it, so each tower is compiled once
TOKENIZERS = ("CLIPTokenizer", "SiglipTokenizer", "GemmaTokenizer")  # the only tokenizer classes that are loaded
DECIMALS = 4
UNRELATED = "alignment.unrelated"  # entry of a record's row: for each caption, whether its cosine is too low


def with_model(filter: Filter, folder: Path | str) -> Filter:
    """Returns the filter with a CLIP or SigLIP from a folder in the layout of transformers.

    Raises:
      ValueError: if the folder does not contain such a model in safetensors, with its tokenizer and image processor.
    """
    folder = Path(folder).resolve()
    _load(folder)
    return replace(filter, model=model_digest(folder), score=functools.partial(score, folder))


def model_digest(folder: Path) -> str:
    """SHA-256 of the configuration and the weights in a folder."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(of_file(path))
    return digest.hexdigest()


def score(folder: Path, candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `ALIGNMENT` for each candidate."""
    images = embed_images(folder, candidates)
    texts = iter(
        _load(folder).embed_texts([text.text for candidate in candidates for text in candidate.record.captions])
    )
    return [
        {"cosines": [round(float(next(texts) @ image), DECIMALS) for _ in candidate.record.captions]}
        for candidate, image in zip(candidates, images, strict=True)
    ]


def embed_images(folder: Path, candidates: Sequence[Candidate]) -> Float[np.ndarray, "n E"]:
    """Unit vectors of the candidates' images. The last batch is cached for the next filter."""
    encoder = _load(folder)
    if encoder.last is None or [id(candidate) for candidate in encoder.last[0]] != [id(one) for one in candidates]:
        images = encoder.embed_images([over_white(candidate.target.image) for candidate in candidates])
        encoder.last = list(candidates), images
    return encoder.last[1]


def embed_upright(folder: Path, images: Sequence[Any]) -> Float[np.ndarray, "n E"]:
    """Unit vectors of upright RGB images."""
    return _load(folder).embed_images(images)


def no_model(candidates: Sequence[Candidate]) -> list[dict]:
    """Placeholder for the score function of a filter without a model; it is never called."""
    raise ValueError("this filter has no model; see filters.cascade")


class Encoder:
    """Maps images and texts to unit vectors, on JAX's default device in fp32."""

    def __init__(self, folder: Path):
        import jax
        import transformers
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        from qi2_jax.interop import files, stored_weights
        from qi2_jax.interop.clip import NAMES
        from qi2_jax.models import tree
        from qi2_jax.models.clip import CLIP, DualEncoder, DualEncoderConfig

        self.last: tuple[list[Candidate], np.ndarray] | None = None
        files.check_links(folder)
        self.config = DualEncoderConfig.from_dict(files.read_json(folder / "config.json"))
        like = jax.eval_shape(lambda key: DualEncoder(self.config, key=key), jax.random.key(0))
        shapes = {name: tuple(leaf.shape) for name, leaf in tree.to_dict(like).items()}
        weights, _ = stored_weights.open_published(folder, "model", shapes, NAMES)
        self.model = stored_weights.load(weights, like, dtype=np.float32)

        settings = files.read_json(folder / "tokenizer_config.json")
        name = str(settings.get("tokenizer_class", "CLIPTokenizer")).removesuffix("Fast")
        if name not in TOKENIZERS:
            raise ValueError(f"{folder} names the tokenizer {name!r}; supported: {', '.join(TOKENIZERS)}")
        processor = CLIPImageProcessorPil if self.config.kind == CLIP else SiglipImageProcessorPil
        try:
            self.tokenizer = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
            self.processor = processor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # these readers raise errors of any type on broken files
            raise ValueError(f"{folder} has no readable tokenizer or image processor: {error!r}") from error
        self._images = jax.jit(lambda model, pixels: model.embed_images(pixels))
        self._texts = jax.jit(lambda model, ids: model.embed_texts(ids))

    def embed_images(self, images: Sequence[Any]) -> Float[np.ndarray, "n E"]:
        """Unit vectors of RGB images, preprocessed by the folder's processor."""

        def prepare(part: Sequence[Any]) -> Float[np.ndarray, "n H W 3"]:
            pixels = self.processor(list(part), return_tensors="np")["pixel_values"]
            return np.asarray(pixels, np.float32).transpose(0, 2, 3, 1)

        return self._batches(images, prepare, self._images)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Unit vectors of texts, truncated to the model's number of positions."""

        def prepare(part: Sequence[str]) -> Int[np.ndarray, "n T"]:
            options = {"padding": "max_length", "truncation": True, "max_length": self.config.positions}
            return np.asarray(self.tokenizer(list(part), **options)["input_ids"], np.int32)

        return self._batches(texts, prepare, self._texts)

    def _batches(
        self,
        items: Sequence[Any],
        prepare: Callable[[Sequence[Any]], np.ndarray],
        embed: Callable[[Any, np.ndarray], Any],
    ) -> Float[np.ndarray, "n E"]:
        parts = [np.zeros((0, self.config.embedding), np.float32)]
        for start in range(0, len(items), BATCH):
            rows = prepare(items[start : start + BATCH])
            full = np.concatenate([rows, np.repeat(rows[:1], BATCH - len(rows), axis=0)])
            parts.append(np.asarray(embed(self.model, full))[: len(rows)])
        return np.concatenate(parts)


@functools.cache
def _load(folder: Path) -> Encoder:
    return Encoder(folder)


def _drops_caption(row: Row, number: int, settings: Settings) -> str | None:
    return "unrelated" if row[UNRELATED][number] else None


ALIGNMENT = Filter(
    name="alignment",
    version=2,
    columns={"cosines": (list[float], "cosine of each caption with the image, -1..1; unrelated texts are near 0")},
    score=no_model,
    thresholds=(
        Threshold(
            "alignment_by",
            "alignment",
            "filter whose cosines are compared: `alignment`, or `label_alignment` for a trial without a CLIP",
        ),
        Threshold(
            "min_alignment",
            -1.0,
            "cosine of a caption with its image; depends on the model",
            low=-1,
            high=1,
            column="cosines",
            applies_to="pairs",
            by_group=True,
            reason="unrelated",
        ),
        Threshold(
            "min_alignment_percentile",
            0.0,
            "percentage of captions with the lowest cosines that is dropped in each language and class",
            low=0,
            high=100,
            reason="unrelated",
        ),
    ),
    step="captions",
    drops_caption=_drops_caption,
    optional=True,
    on_device=True,
    needs="score with --clip FOLDER of a CLIP or SigLIP",
)
