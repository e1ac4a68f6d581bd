"""A record is kept without an optional part that cannot be used."""

import pytest

from data_pipeline.records.schema import MAX_CAPTION_CHARS, Caption
from data_pipeline.sources import DEFAULTS, LOST, Options
from data_pipeline.sources.base import Refused
from data_pipeline.sources.fields import CaptionFile, describe, merge

FINE = Caption("hills")


@pytest.mark.parametrize(
    ("fields", "captions", "lost"),
    [
        ({"captions": ["hills", ""]}, (FINE,), {"missing_caption"}),
        ({"captions": ["hills", {"text": " ", "language": "zh"}]}, (FINE,), {"missing_caption"}),
        ({"captions": ["hills", "x" * (MAX_CAPTION_CHARS + 1)]}, (FINE,), {"caption_too_long"}),
        ({"captions": ["hills", None, 3, {"kind": "text"}]}, (FINE,), {"bad_metadata"}),
        ({"captions": ["hills", "a\0b"]}, (FINE,), {"not_utf8"}),
        ({"captions": [{"text": "hills", "language": "en_US"}]}, (Caption("hills", language="en-US"),), set()),
        ({"captions": [{"text": "hills", "language": "zh_CN.UTF-8"}]}, (Caption("hills", language="zh-CN"),), set()),
        ({"captions": [{"text": "hills", "language": "English"}]}, (FINE,), {"bad_language"}),
        ({"captions": [{"text": "hills", "kind": "poem", "more": 1}]}, (FINE,), {"unknown_kind"}),
        ({"captions": "hills"}, (FINE,), set()),
        ({"captions": ["hills"], "text": "rivers"}, (FINE, Caption("rivers")), set()),
        ({"captions": ["hills", "hills"]}, (FINE,), set()),
        ({"text": "hills", "licence": {"a": 1}}, (FINE,), {"bad_licence"}),
        ({"text": "hills", "tags": 7}, (FINE,), {"bad_tag"}),
        ({"text": "hills", "tags": ["sky", "", "x" * 65]}, (FINE,), {"bad_tag"}),
    ],
)
def test_what_is_lost(fields, captions, lost):
    found = describe(fields, DEFAULTS)
    assert found.captions == captions and set(found.lost) == lost <= set(LOST)


def test_tags_are_a_list_or_a_string_and_the_first_are_kept():
    assert describe({"text": "hills", "tags": "outdoors sky hill"}, DEFAULTS).tags == ("outdoors sky hill",)
    assert describe({"text": "hills", "tags": "sky, hill ,sky"}, DEFAULTS).tags == ("sky", "hill")
    found = describe({"text": "hills", "tags": [f"tag_{n}" for n in range(30)]}, DEFAULTS)
    assert found.tags == tuple(f"tag_{n}" for n in range(16)) and found.lost == ("too_many_tags",)


def test_the_first_captions_are_kept():
    found = describe({"captions": [f"way {n}" for n in range(70)]}, DEFAULTS)
    assert len(found.captions) == 64 and found.lost == ("too_many_captions",)


def test_an_unreadable_text_file_does_not_lose_the_record():
    found = describe({"text": "hills"}, Options(licence="CC0"), [CaptionFile(Refused("not_utf8"))])
    assert (found.captions, found.licence, found.lost) == ((FINE,), "CC0", ("not_utf8",))
    assert describe({"text": "hills", "licence": " "}, Options(licence="CC0")).licence == "CC0"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "missing_caption"),
        ({"captions": ["", " "]}, "missing_caption"),
        ({"captions": [{"text": "hills", "kind": "instruction"}]}, "bad_metadata"),
        ({"text": "hills", "conditions": [3]}, "bad_metadata"),
        ({"text": "hills", "conditions": ["x"] * 11}, "bad_metadata"),
    ],
)
def test_reasons_that_refuse_the_sample(fields, reason):
    with pytest.raises(Refused) as refusal:
        describe(fields, DEFAULTS)
    assert refusal.value.reason == reason


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({}, ("no_caption",)),
        ({"captions": ["", " "]}, ("missing_caption", "missing_caption", "no_caption")),
        ({"text": "hills"}, ()),
    ],
)
def test_images_without_captions_are_accepted_on_request_and_counted(fields, lost):
    found = describe(fields, Options(without_captions=True))
    assert found.lost == lost and set(lost) <= set(LOST)
    assert found.captions == ((FINE,) if fields.get("text") else ())


def test_a_later_caption_is_not_missing():
    options = Options(without_captions=True)
    found = merge(describe({}, options), describe({"text": "hills"}, options))
    assert (found.captions, found.lost) == ((FINE,), ())
