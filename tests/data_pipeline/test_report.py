"""The page of a folder shows its funnel, its scores and its pictures, and nothing from outside acts in it."""

import re

import pytest

from data_pipeline.buckets import Buckets, Resolutions
from data_pipeline.cascade import score
from data_pipeline.records import Caption, Record
from data_pipeline.report import LIMITS, script_of, write_report
from data_pipeline.selection import Thresholds, select
from data_pipeline.shards import write_shards


@pytest.fixture
def page(tmp_path, picture, encoded):
    texts = ("a <b>red</b> boat & sea", "一只红色的狐狸在雪地里", "قارب أحمر في البحر", "x" * 40)
    captions = [
        Caption(text, language=language) for text, language in zip(texts, ("en", "zh", "ar", None), strict=True)
    ]
    records = [
        Record(
            f"<script>{i}</script>.png",
            encoded(picture(i, ((40, 70, 50, 60)[i], 40))),
            (caption,),
            "s",
            tags=("nature/sea",),
        )
        for i, caption in enumerate(captions)
    ]
    write_shards(tmp_path, [*records, Record("broken", b"x", (), "s")], records_per_shard=8)
    score(tmp_path, workers=1, progress=False)
    selection = select(tmp_path, Thresholds(min_side=30, max_aspect=1.6))
    write_report(
        tmp_path / "page.html", tmp_path, selection, Resolutions(((64, Buckets.for_area(64, ("1:1", "2:3"))),))
    )
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_names_and_captions_are_escaped_and_nothing_is_loaded(page):
    assert "<script" not in page and "<b>red" not in page
    assert "&lt;script&gt;0&lt;/script&gt;.png" in page and "a &lt;b&gt;red&lt;/b&gt; boat &amp; sea" in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)', page))
    assert not re.search(r"https?://", page)


def test_page_shows_funnel_scores_tables_and_captions_by_script(page):
    assert "5 records, 2 kept." in page
    for text in ("unknown_format 1", "too_long 1", "repeats_itself 1", "64x64", "zh", "nature/sea", "ARABIC", "LATIN"):
        assert text in page
    for limit in LIMITS:
        absent = limit.column.startswith(("compression.jpeg", "alignment", "aesthetic"))  # no JPEG, no model
        assert (limit.column in page) == (not absent), limit
    assert page.count("<svg") == page.count("<section>") == len(LIMITS) - 3
    assert "alignment was not scored" in page


@pytest.mark.parametrize(
    ("text", "script"), [("Hallo 你", "LATIN"), ("您好", "CJK"), ("…12", "none"), ("नमस्ते", "DEVANAGARI")]
)
def test_script_of(text, script):
    assert script_of(text) == script
