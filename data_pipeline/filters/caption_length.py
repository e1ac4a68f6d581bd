"""Captions: their length in tokens of the real tokenizer, refusals, and text that repeats itself."""

import functools
import re
import zlib
from collections.abc import Sequence

from data_pipeline.filters.base import Candidate, Filter
from data_pipeline.filters.refusals import is_refusal
from data_pipeline.records.schema import Caption
from qi2_jax.text.qwen_tokenizer import SPECIAL_TOKENS, build_qwen_tokenizer

# Text that Qwen's tokenizer takes for its own tokens, which end turns or stand for images; no caption may hold it.
CONTROL = re.compile("|".join(re.escape(token) for token, _ in SPECIAL_TOKENS))
RUN = re.compile(r"(.)\1*", re.DOTALL)


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `CAPTION_LENGTH` for each candidate."""
    texts = [caption.text for candidate in candidates for caption in candidate.record.captions]
    counts = iter([len(ids) for ids in _tokenizer()(texts).input_ids] if texts else [])
    return [_score(candidate.record.captions, counts) for candidate in candidates]


@functools.cache
def _tokenizer():
    return build_qwen_tokenizer()


def _score(captions: tuple[Caption, ...], counts) -> dict:
    texts = [caption.text for caption in captions]
    return {
        "tokens": [next(counts) for _ in texts],
        "refusal": [is_refusal(text) for text in texts],
        "reserved": [CONTROL.search(text) is not None for text in texts],
        "longest_run": [max(len(run[0]) for run in RUN.finditer(text)) for text in texts],
        "compressed": [round(len(zlib.compress(text.encode(), 9)) / len(text.encode()), 4) for text in texts],
    }


CAPTION_LENGTH = Filter(
    name="caption_length",
    version=2,
    columns={
        "tokens": (list[int], "of each caption, by Qwen's tokenizer"),
        "refusal": (list[bool], "of each caption, whether a captioning model refused to write it (`refusals`)"),
        "reserved": (
            list[bool],
            "of each caption, whether it holds a token of the tokenizer's own, such as <|im_end|>",
        ),
        "longest_run": (list[int], "of each caption, how often it repeats one character in a row at most"),
        "compressed": (
            list[float],
            "of each caption, size after compression over size: below 0.2 a text repeats itself",
        ),
    },
    score=score,
    sees_broken=True,
)
