"""Refusals of captioning models are distinguished from captions that begin like them."""

import itertools

from data_pipeline.filters.refusals import is_refusal
from tests.data_pipeline.filters.refusal_texts import REFUSED, TRUTHFUL


def test_refusals_are_distinguished_from_captions_that_begin_like_them():
    assert [text for text in itertools.chain(*REFUSED.values()) if not is_refusal(text)] == []
    assert [text for text in itertools.chain(*TRUTHFUL.values()) if is_refusal(text)] == []
    refused = REFUSED["en"][0]
    assert is_refusal('"I can’t describe this image."') and not is_refusal("a boat " * 100 + refused)
