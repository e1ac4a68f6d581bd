"""From prompts and condition images to the features that condition the diffusion transformer.

The formulas are those of Qwen-Image-2.1's published pipeline (diffusers `pipeline_qwenimage21.py`): the chat is a plain
string, prompts are padded on the left, and the features of the system turn are cut off after encoding. The features of
an image only mark the place that its latents take in the joint sequence.

Dims: `B` prompts, `S` tokens, `D` width of the encoder's text tower.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from qi2_jax.attention import Kernel
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.models.qwen3_vl.inputs import EncoderInputs, prepare_inputs
from qi2_jax.models.qwen3_vl.model import Qwen3VL
from qi2_jax.pixels import over_white
from qi2_jax.runtime import compiler
from qi2_jax.runtime.text_files import read_text
from qi2_jax.text.qwen_tokenizer import RESERVED

SYSTEM_PROMPT = "Comprehend and analyze the provided prompt."
EMPTY_PROMPT = " "  # Qwen has no start token: an empty text would give the encoder nothing to read
TEMPLATE = (
    f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
    "<|im_start|>user\n{images}{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
IMAGE_TEMPLATE = "<image{number}><|vision_start|><|image_pad|><|vision_end|>"
# In characters; published templates are far shorter.
MAX_CHAT_TEMPLATE, MAX_SYSTEM_TURN = 1 << 20, 1 << 16


@dataclasses.dataclass(frozen=True)
class Segments:
    """The features of one prompt, system turn excluded, that belong to text and to each condition image.

    Attributes:
      text: ranges of text features before, between and after the images: one more than there are images.
      images: ranges of the features of each condition image, whose place its latents take in the joint sequence.
    """

    text: tuple[range, ...]
    images: tuple[range, ...] = ()

    @property
    def length(self) -> int:
        """Number of all features."""
        return self.text[-1].stop

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Number of text features in each segment."""
        return tuple(map(len, self.text))

    @property
    def text_indices(self) -> Int[np.ndarray, "text"]:
        """Indices of all text features, in order."""
        return np.concatenate([np.arange(span.start, span.stop) for span in self.text])


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts prepared for the encoder, as host arrays.

    Attributes:
      inputs: input of the encoder, with the system turn.
      num_system_tokens: number of tokens of the system turn, which precedes every prompt.
      segments: features after the system turn, for each prompt.
    """

    inputs: EncoderInputs
    num_system_tokens: int
    segments: tuple[Segments, ...]


class PromptProcessor:
    """Turns prompts with condition images into `PromptBatch`es, without PyTorch.

    Args:
      tokenizer: a Qwen tokenizer of transformers.
      image_processor: a `Qwen2VLImageProcessorPil` of transformers.
      config: configuration of the encoder that reads the batches.
      chat_template: Jinja template of the system turn, whose tokens are counted and cut off; by default the
        tokenizer's template.

    Raises:
      ValueError: if tokenizer, image processor and configuration do not fit together.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, config: Qwen3VLConfig, chat_template: str | None = None):
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        found = tokenizer.convert_tokens_to_ids(RESERVED[0])
        if found != config.image_token_id:
            raise ValueError(
                f"the tokenizer has {RESERVED[0]} at {found}, the encoder's configuration at {config.image_token_id}"
            )
        vision = config.vision
        ours = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        theirs = image_processor.patch_size, image_processor.temporal_patch_size, image_processor.merge_size
        if ours != theirs:
            raise ValueError(
                f"the image processor makes patches of (side, frames, merge) {theirs}, the encoder reads {ours}"
            )
        self.num_system_tokens = len(tokenizer(_system_turn(tokenizer, chat_template))["input_ids"])

    @classmethod
    def from_folder(cls, folder: str | Path, config: Qwen3VLConfig) -> Self:
        """Reads a published processor folder (tokenizer, image preprocessing, chat template) without network access.

        Raises:
          ValueError: if the folder does not exist or cannot be read, and as the constructor.
        """
        from transformers import Qwen2Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the processor folder of a Qwen-Image-2.1 pipeline")
        # The classes are named here, so that a folder cannot choose which code reads it.
        legacy = folder / "chat_template.json"
        try:
            tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
            template = json.loads(read_text(legacy))["chat_template"] if legacy.is_file() else None
        except Exception as error:  # transformers raises errors of any type for damaged files
            raise ValueError(f"{folder} contains no readable Qwen tokenizer and image processor: {error!r}") from error
        return cls(tokenizer, image_processor, config, template)

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        multiple: int = 1,
        enlarge: bool = True,
        image_count: int | None = None,
        patch_count: int | None = None,
    ) -> PromptBatch:
        """Prepares a batch.

        Args:
          prompts: one text per sample; an empty text is replaced by a blank.
          images: condition images of each sample, from `resize_condition`; they are composited over white.
          multiple: padding granularity: the longest prompt is padded to a multiple of it, so that batches of similar
            length share compiled programs.
          enlarge: whether to enlarge small images to the processor's lower limit (256 x 256 pixels), as the published
            processor does. They then have more than one feature per 2 x 2 latents, which no pipeline can use.
          image_count, patch_count: shapes to pad to, see `prepare_inputs`.

        Raises:
          ValueError: for a prompt that contains a reserved token, with `enlarge=False` for a condition image that the
            processor would resize, and as `prepare_inputs`.
        """
        images = [()] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many lists of condition images, got {len(images)}")
        for prompt in prompts:
            if found := [token for token in RESERVED if token in prompt]:
                raise ValueError(f"prompt {prompt!r} contains {found[0]}, which stands for pixels; remove it")
        pixels, grids = self._patches(list(itertools.chain.from_iterable(images)), enlarge)
        merge = self.config.vision.spatial_merge_size**2
        features = iter([] if grids is None else (np.prod(grids, axis=1) // merge).tolist())
        texts = [render(prompt, len(conditions)) for prompt, conditions in zip(prompts, images, strict=True)]
        token_ids, segments = [], []
        for ids in self.tokenizer(texts)["input_ids"]:
            expanded, spans = _expand_images(ids, self.config.image_token_id, features)
            token_ids.append(expanded)
            segments.append(_segments(len(expanded), spans, self.num_system_tokens))
        inputs = prepare_inputs(
            self.config,
            token_ids,
            pixels,
            grids,
            length=-(-max(map(len, token_ids)) // multiple) * multiple if token_ids else None,
            image_count=image_count,
            patch_count=patch_count,
        )
        return PromptBatch(inputs, self.num_system_tokens, tuple(segments))

    def _patches(
        self, images: Sequence[Image.Image], enlarge: bool
    ) -> tuple[Float[np.ndarray, "patches C"] | None, Int[np.ndarray, "I 3"] | None]:
        """Patches of all images, and the grid (frames, rows, columns) of each; None without images."""
        if not images:
            return None, None
        patch = self.image_processor.patch_size
        limits = dict(self.image_processor.size)  # areas in pixels, despite their names shortest_edge and longest_edge
        if not enlarge:
            limits["shortest_edge"] = (patch * self.image_processor.merge_size) ** 2
        result = self.image_processor([over_white(image) for image in images], size=limits, return_tensors="np")
        for image, (_, rows, columns) in zip(images, result["image_grid_thw"].tolist(), strict=True):
            # One feature must stand for exactly 2 x 2 latents of the same pixels.
            if not enlarge and (columns * patch, rows * patch) != image.size:
                raise ValueError(
                    f"the model's image processor would resize a condition image of {image.width}x{image.height} "
                    f"pixels to {columns * patch}x{rows * patch}: it takes areas up to {limits['longest_edge']} "
                    f"pixels; choose a resolution of at most {math.isqrt(limits['longest_edge'])}"
                )
        return result["pixel_values"], result["image_grid_thw"]


def _system_turn(tokenizer: Any, chat_template: str | None) -> str:
    template = chat_template or tokenizer.chat_template
    if template is None:
        raise ValueError("the processor has no chat template; its folder should contain chat_template.jinja")
    if not isinstance(template, str) or len(template) > MAX_CHAT_TEMPLATE:
        raise ValueError(f"the chat template must be a text of at most {MAX_CHAT_TEMPLATE} characters")
    message = {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]}
    try:
        turn = tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program, and can raise anything
        raise ValueError(f"the chat template {template!r:.80} cannot render a system turn: {error!r}") from error
    if len(turn) > MAX_SYSTEM_TURN:
        raise ValueError(f"the chat template {template!r:.80} renders a system turn of {len(turn)} characters")
    return turn


def _expand_images(
    ids: Sequence[int], image_token_id: int, features: Iterator[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids with each image token repeated once per feature, and (start, count) of each image."""
    expanded: list[int] = []
    spans: list[tuple[int, int]] = []
    for token in ids:
        count = 1
        if token == image_token_id:
            count = next(features)
            spans.append((len(expanded), count))
        expanded += [token] * count
    return expanded, spans


def _segments(length: int, images: Sequence[tuple[int, int]], num_system_tokens: int) -> Segments:
    spans = [range(start - num_system_tokens, start - num_system_tokens + count) for start, count in images]
    edges = [0, *itertools.chain.from_iterable((span.start, span.stop) for span in spans), length - num_system_tokens]
    return Segments(tuple(range(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)), tuple(spans))


def render(prompt: str, image_count: int = 0) -> str:
    """The encoder's input as text: the chat, with one placeholder per condition image."""
    images = " ".join(IMAGE_TEMPLATE.format(number=number) for number in range(1, image_count + 1))
    return TEMPLATE.format(images=images, prompt=prompt or EMPTY_PROMPT)


def condition_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) to which a condition image is resized: about `resolution`^2 pixels with its aspect ratio.

    The sides are multiples of 32 pixels, which are one feature of the encoder and 2 x 2 latents of the autoencoder.

    Raises:
      ValueError: for an image so narrow that a side would be 0.
    """
    ratio = width / height
    ideal = math.sqrt(resolution * resolution * ratio)
    size = round(ideal / 32) * 32, round(ideal / ratio / 32) * 32
    if min(size) == 0:
        raise ValueError(f"an image of {width} x {height} has no side left at resolution {resolution}; crop it")
    return size


def resize_condition(image: Image.Image, resolution: int) -> Image.Image:
    """The RGBA image that both the encoder and the autoencoder read, resized once (Lanczos)."""
    size = condition_size(*image.size, resolution)
    return image.convert("RGBA").resize(size, resample=Image.Resampling.LANCZOS)


@compiler.jit(static_argnums=2)
def hidden_states(model: Qwen3VL, inputs: EncoderInputs, kernel: str | Kernel) -> Float[Array, "B S D"]:
    """The program of `encode_prompts`: hidden states of all tokens, also of padding and of the system turn."""
    return model(inputs, kernel=kernel)


def encode_prompts(
    model: Qwen3VL, batch: PromptBatch, *, kernel: str | Kernel = "auto"
) -> list[Float[np.ndarray, "_ D"]]:
    """Features of each prompt without padding and system turn, on the host, in the dtype of the encoder's embeddings.

    The ranges in a prompt's `Segments` index the rows of its features.
    """
    hidden_BSD = np.asarray(hidden_states(model, batch.inputs, kernel))
    valid_BS = np.asarray(batch.inputs.valid)
    return [row[valid][batch.num_system_tokens :] for row, valid in zip(hidden_BSD, valid_BS, strict=True)]
