"""Captions: length in tokens of Qwen's tokenizer, refusals, repetitions and misread text."""

import functools
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold
from data_pipeline.filters.refusals import is_refusal
from data_pipeline.records.schema import Caption
from qi2_jax.text.qwen_tokenizer import SPECIAL_TOKENS, build_qwen_tokenizer

# Text that Qwen's tokenizer reads as special tokens, which end turns or mark images.
RESERVED = re.compile("|".join(re.escape(token) for token, _ in SPECIAL_TOKENS))
RUN = re.compile(r"(.)\1*", re.DOTALL)
# Control characters, except white space: remains of UTF-16 text or binary data that was read as UTF-8.
CONTROL = re.compile(r"[\0-\x08\x0e-\x1f\x7f\ufffe\uffff]")
MIN_LETTERS = 2  # letters of an instruction: "上色" and "zoom in", two tokens each, are complete


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `CAPTION_LENGTH` for each candidate."""
    texts = [caption.text for candidate in candidates for caption in candidate.record.captions]
    counts = iter([len(ids) for ids in _tokenizer()(texts).input_ids] if texts else [])
    return [_score(candidate.record.captions, counts) for candidate in candidates]


@functools.cache
def _tokenizer() -> Any:
    return build_qwen_tokenizer()


def _score(captions: tuple[Caption, ...], counts: Iterator[int]) -> dict:
    texts = [caption.text for caption in captions]
    return {
        "tokens": [next(counts) for _ in texts],
        "refusal": [is_refusal(text) for text in texts],
        "reserved": [RESERVED.search(text) is not None for text in texts],
        "letters": [sum(map(str.isalnum, text)) for text in texts],
        "control": [CONTROL.search(text) is not None for text in texts],
        "longest_run": [max(len(run[0]) for run in RUN.finditer(text)) for text in texts],
        "compressed": [round(len(zlib.compress(text.encode(), 9)) / len(text.encode()), 4) for text in texts],
    }


def _drops_caption(row: Row, number: int, settings: Settings) -> str | None:
    caption = {name: row[f"caption_length.{name}"][number] for name in CAPTION_LENGTH.columns}
    edit, tokens = bool(row["description.conditions"]), caption["tokens"]
    if caption["reserved"]:
        return "reserved_token"
    if caption["control"]:
        return "control_character"
    if caption["letters"] < MIN_LETTERS if edit else tokens < settings.min_tokens:
        return "too_short"
    if tokens > settings.max_tokens or (edit and tokens > settings.max_instruction_tokens):
        return "too_many_tokens"
    if caption["refusal"]:
        return "refusal"
    repetitive = tokens >= settings.repetitive_tokens and caption["compressed"] < settings.min_compressed
    return "repeats_itself" if repetitive or caption["longest_run"] > settings.max_run else None


def _compressed(row: Row, settings: Settings) -> list[float]:
    pairs = zip(row["caption_length.compressed"], row["caption_length.tokens"], strict=True)
    return [ratio for ratio, tokens in pairs if tokens >= settings.repetitive_tokens]


CAPTION_LENGTH = Filter(
    name="caption_length",
    version=4,
    columns={
        "tokens": (list[int], "tokens of each caption, by Qwen's tokenizer"),
        "refusal": (list[bool], "for each caption, whether it is a captioning model's refusal (`refusals`)"),
        "reserved": (
            list[bool],
            "for each caption, whether it contains a special token of the tokenizer, such as <|im_end|>",
        ),
        "letters": (list[int], "letters and digits of each caption"),
        "control": (list[bool], "for each caption, whether it contains control characters, as misread UTF-16 does"),
        "longest_run": (list[int], "longest run of one character in each caption"),
        "compressed": (
            list[float],
            "compressed size of each caption over its size; below 0.2 the text repeats itself",
        ),
    },
    score=score,
    thresholds=(
        Threshold(
            "min_tokens",
            3,
            f"tokens of a caption; instructions need {MIN_LETTERS} letters instead",
            low=0,
            high=1 << 20,
            column="tokens",
            applies_to="pairs",
            logarithmic=True,
            reason="too_short",
        ),
        Threshold(
            "max_tokens",
            1024,
            "tokens of a caption or instruction",
            low=1,
            high=1 << 20,
            column="tokens",
            keeps="below",
            logarithmic=True,
            reason="too_many_tokens",
        ),
        Threshold(
            "max_instruction_tokens",
            512,
            "tokens of an instruction",
            low=1,
            high=1 << 20,
            column="tokens",
            keeps="below",
            applies_to="edits",
            logarithmic=True,
            reason="too_many_tokens",
        ),
        Threshold(
            "max_run",
            20,
            "longest run of one character in a caption",
            low=1,
            high=1 << 20,
            column="longest_run",
            keeps="below",
            logarithmic=True,
            reason="repeats_itself",
        ),
        Threshold(
            "min_compressed",
            0.2,
            "compressed size over size of a caption with at least `repetitive_tokens` tokens; repetitive text has a "
            "lower ratio",
            low=0,
            high=1,
            column="compressed",
            values=_compressed,
            reason="repeats_itself",
        ),
        Threshold(
            "repetitive_tokens",
            50,
            "minimum tokens of a caption for `min_compressed` to apply; shorter captions compress too little",
            low=0,
            high=1 << 20,
        ),
    ),
    step="captions",
    drops_caption=_drops_caption,
    sees_broken=True,
)
