"""From prompts and condition images to the features that condition the diffusion transformer.

The formulas are those of Qwen-Image-2.1's published pipeline (diffusers `pipeline_qwenimage21.py`): the chat is a raw
string, prompts are padded on the left, the system turn is dropped after encoding, and the tokens of an image are kept
only to mark the place that its latents take in the joint sequence.

Dims: `B` prompts, `S` tokens, `D` width of the encoder's text tower.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from qi2_jax.attention import Kernel
from qi2_jax.models.qwen3_vl import EncoderInputs, Qwen3VL, Qwen3VLConfig, prepare_inputs
from qi2_jax.pixels import over_white
from qi2_jax.text.qwen_tokenizer import RESERVED

SYSTEM_PROMPT = "Comprehend and analyze the provided prompt."
EMPTY_PROMPT = " "  # Qwen has no token that starts a sequence: nothing at all would leave nothing to read
TEMPLATE = (
    f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
    "<|im_start|>user\n{images}{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
MAX_TEMPLATE, MAX_TURN = 1 << 20, 1 << 16  # characters, far above any published template's
IMAGE_TEMPLATE = "<image{number}><|vision_start|><|image_pad|><|vision_end|>"


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the kept features of one prompt are text and where they mark an image.

    Attributes:
      text: ranges of text features, before, between and after the images: one more than there are images.
      images: ranges of the features of each condition image; its latents take their place in the joint sequence.
    """

    text: tuple[range, ...]
    images: tuple[range, ...] = ()

    @property
    def length(self) -> int:
        return self.text[-1].stop


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts ready for the encoder, as host arrays.

    Attributes:
      inputs: what the encoder reads, system turn included.
      dropped: number of leading tokens, padding aside, whose features are not used: the system turn.
      segments: per prompt, the features that remain.
    """

    inputs: EncoderInputs
    dropped: int
    segments: tuple[Segments, ...]


class PromptProcessor:
    """Turns prompts with condition images into `PromptBatch`es, without PyTorch.

    Args:
      tokenizer: a Qwen tokenizer of transformers.
      image_processor: a `Qwen2VLImageProcessorPil` of transformers.
      config: configuration of the encoder that will read the batches.
      chat_template: Jinja template that renders the system turn whose length is dropped; by default the tokenizer's.

    Raises:
      ValueError: if tokenizer, image processor and configuration do not belong together.
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
        template = chat_template or tokenizer.chat_template
        if template is None:
            raise ValueError("the processor has no chat template; its folder should hold chat_template.jinja")
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            raise ValueError(f"the chat template must be a text of at most {MAX_TEMPLATE} characters")
        message = {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]}
        try:
            turn = tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)
        except Exception as error:  # a template is a program, and fails like one
            raise ValueError(f"the chat template {template!r:.80} cannot render a system turn: {error!r}") from error
        if len(turn) > MAX_TURN:
            raise ValueError(f"the chat template {template!r:.80} renders a system turn of {len(turn)} characters")
        self.dropped = len(tokenizer(turn)["input_ids"])

    @classmethod
    def from_folder(cls, folder: str | Path, config: Qwen3VLConfig) -> Self:
        """Reads a published processor folder: tokenizer, image preprocessing and chat template; local files only.

        Raises:
          ValueError: if the folder does not exist or cannot be read, and as the constructor.
        """
        from transformers import Qwen2Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the processor folder of a Qwen-Image-2.1 pipeline")
        # Named classes instead of the automatic ones: a folder cannot choose which code reads it.
        legacy = folder / "chat_template.json"
        try:
            tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
            template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"] if legacy.is_file() else None
        except Exception as error:  # these readers meet broken files with errors of any type
            raise ValueError(f"{folder} holds no readable Qwen tokenizer and image processor: {error!r}") from error
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
          prompts: one text per sample; an empty one is read as a blank.
          images: the condition images of every sample, from `resize_condition`; alpha is laid over white.
          multiple: the longest prompt is padded to a multiple of it, so that similar batches share compiled programs.
          enlarge: whether small images are enlarged to the processor's lower limit (256 x 256 pixels), as the published
            one does. They then have more features than latents, and no pipeline can use them.
          image_count, patch_count: shapes to pad to, see `prepare_inputs`.

        Raises:
          ValueError: for a prompt that contains a reserved token, and as `prepare_inputs`.
        """
        images = [()] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many lists of condition images, got {len(images)}")
        for prompt in prompts:
            if found := [token for token in RESERVED if token in prompt]:
                raise ValueError(f"prompt {prompt!r} contains {found[0]}, which stands for pixels; remove it")
        flat = [over_white(image) for image in itertools.chain.from_iterable(images)]
        limits = dict(self.image_processor.size)  # areas, whatever they are called
        if not enlarge:
            limits["shortest_edge"] = (self.image_processor.patch_size * self.image_processor.merge_size) ** 2
        pixels = self.image_processor(flat, size=limits, return_tensors="np") if flat else {}
        grids = pixels.get("image_grid_thw")
        texts = [render(prompt, len(own)) for prompt, own in zip(prompts, images, strict=True)]

        merge = self.config.vision.spatial_merge_size**2
        features = iter([] if grids is None else (np.prod(grids, axis=1) // merge).tolist())
        token_ids, segments = [], []
        for ids in self.tokenizer(texts)["input_ids"]:
            expanded: list[int] = []
            starts: list[tuple[int, int]] = []
            for token in ids:
                if token == self.config.image_token_id:
                    starts.append((len(expanded), next(features)))
                    expanded += [token] * starts[-1][1]
                else:
                    expanded.append(token)
            token_ids.append(expanded)
            segments.append(_segments(len(expanded), starts, self.dropped))
        inputs = prepare_inputs(
            self.config,
            token_ids,
            pixels.get("pixel_values"),
            grids,
            length=-(-max(map(len, token_ids)) // multiple) * multiple if token_ids else None,
            image_count=image_count,
            patch_count=patch_count,
        )
        return PromptBatch(inputs, self.dropped, tuple(segments))


def _segments(length: int, images: Sequence[tuple[int, int]], dropped: int) -> Segments:
    spans = [range(start - dropped, start - dropped + count) for start, count in images]
    edges = [0, *itertools.chain.from_iterable((span.start, span.stop) for span in spans), length - dropped]
    return Segments(tuple(range(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)), tuple(spans))


def render(prompt: str, image_count: int = 0) -> str:
    """The chat that the encoder reads, with one placeholder per condition image."""
    images = " ".join(IMAGE_TEMPLATE.format(number=number) for number in range(1, image_count + 1))
    return TEMPLATE.format(images=images, prompt=prompt or EMPTY_PROMPT)


def condition_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) of a condition image with about `resolution`^2 pixels, its own aspect ratio, and sides that are
    multiples of 32 pixels: one feature of the encoder, 2 x 2 latents of the autoencoder.

    Raises:
      ValueError: if a side would vanish.
    """
    ratio = width / height
    ideal = math.sqrt(resolution * resolution * ratio)
    size = round(ideal / 32) * 32, round(ideal / ratio / 32) * 32
    if min(size) == 0:
        raise ValueError(f"an image of {width} x {height} has no side left at resolution {resolution}; crop it")
    return size


def resize_condition(image: Image.Image, resolution: int) -> Image.Image:
    """A condition image as both the encoder and the autoencoder read it: RGBA, resized once (Lanczos)."""
    size = condition_size(*image.size, resolution)
    return image.convert("RGBA").resize(size, resample=Image.Resampling.LANCZOS)


@functools.partial(jax.jit, static_argnames="kernel")
def _hidden_states(model: Qwen3VL, inputs: EncoderInputs, kernel: str | Kernel):
    return model(inputs, kernel=kernel)


def encode_prompts(
    model: Qwen3VL, batch: PromptBatch, *, kernel: str | Kernel = "auto"
) -> list[Float[np.ndarray, "features D"]]:
    """Features of every prompt without padding and system turn, on the host, in the dtype of the encoder's embeddings.

    Row i of a prompt's features belongs to position i of its `Segments`.
    """
    hidden_BSD = np.asarray(_hidden_states(model, batch.inputs, kernel))
    valid_BS = np.asarray(batch.inputs.valid)
    return [row[valid][batch.dropped :] for row, valid in zip(hidden_BSD, valid_BS, strict=True)]
