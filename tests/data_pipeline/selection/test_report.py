"""The page of a folder shows its funnel, its scores and its images, and loads nothing from outside."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from data_pipeline.buckets import Buckets, Resolutions
from data_pipeline.filters import CASCADE
from data_pipeline.filters.alignment import ALIGNMENT
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.report import LIMITS, scripts_of, write_report
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds


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
    for text in ("unknown_format 1", "too_long 1", "repeats_itself 1", "64x64", "zh", "nature/sea", "Arabic", "Latin"):
        assert text in page
    shown = [limit for limit in LIMITS if f"kept side, {limit.threshold} = " in page]
    for limit in LIMITS:
        # no JPEG, no model, no edit, no long caption
        absent = limit.column.startswith(("compression.jpeg", "alignment", "aesthetic", "edit_pair"))
        absent |= limit.declared.applies_to == "edits" or limit.threshold == "min_compressed"
        assert (limit in shown) == (not absent), limit
    assert page.count("<svg") == page.count("<section>") == len(shown)
    assert "alignment was not scored" in page


def test_percentiles_show_the_cut_of_every_group_and_figures_are_those_of_the_page(tmp_path, picture, encoded):
    """Twenty English captions on one level and ten German ones on another; an instruction is not among them."""
    levels = {"en": 0.5, "de": 0.1}

    def cosines(candidates):
        number = [int(candidate.record.key) for candidate in candidates]
        return [
            {"cosines": [levels[text.language] + place / 1000 for text in candidate.record.captions]}
            for place, candidate in zip(number, candidates, strict=True)
        ]

    records = [
        Record(
            f"{i:02d}",
            encoded(picture(i, (48, 32))),
            (Caption(f"one boat {i}", "instruction" if i == 30 else "general", "de" if i % 3 == 2 else "en"),),
            "s",
            tags=("nature/sea",),
            conditions=(encoded(picture(99, (48, 32))),) if i == 30 else (),
        )
        for i in range(31)
    ]
    write_shards(tmp_path, records, records_per_shard=8)
    scored = dataclasses.replace(ALIGNMENT, model="levels", score=cosines)
    score(tmp_path, filters=[scored if one is ALIGNMENT else one for one in CASCADE], workers=1, progress=False)
    selection = select(tmp_path, Thresholds(min_side=30, min_alignment_percentile=50, drop_near_duplicates=False))
    resolutions = Resolutions(((32, Buckets.for_area(32, ("1:1", "3:2"))),))
    figures = write_report(tmp_path / "page.html", tmp_path, selection, resolutions)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")

    groups = figures["groups"]["min_alignment"]
    named = [(group["language"], group["class"], group["scores"], group["below"]) for group in groups]
    assert named == [("en", "nature", 20, 10), ("de", "nature", 10, 5)]
    assert [group["lowest"] for group in groups] == pytest.approx([0.5145, 0.1155], abs=0.002)
    section = next(part for part in page.split("<section>") if part.startswith("<h3>alignment.cosines"))
    assert "min_alignment_percentile = 50" in section and section.split("</section>")[0].count("<line") == 2
    for group in groups:
        assert f"<td>{group['language']}</td><td>nature</td><td>{group['scores']}</td>" in section
    unrelated = selection.to_dict()["funnel"][5]["dropped"]["unrelated"]["count"]
    assert unrelated == sum(group["below"] for group in groups) == 15

    assert json.loads(json.dumps(figures)) == figures
    assert figures["languages"] == {"en": 21, "de": 10} and figures["classes"] == {"nature/sea": 31}
    assert figures["kinds"] == {"general": 30, "instruction": 1}
    fit = figures["resolutions"]
    assert (
        fit["seen"]
        == len(selection.kept)
        == sum(fit["buckets"].values()) + sum(left["count"] for left in fit["left_out"].values())
    )
    assert f"mean crop {fit['mean_cropped']:.1%}" in page


def test_images_of_a_pixel_across_are_shown(tmp_path, encoded):
    rng = np.random.default_rng(0)
    sizes = ((600, 2, 3), (1, 400, 3))
    records = [
        Record(str(i), encoded(Image.fromarray(rng.integers(0, 256, size, np.uint8))), (Caption("a line"),), "s")
        for i, size in enumerate(sizes)
    ]
    write_shards(tmp_path, records, records_per_shard=8)
    score(tmp_path, workers=1, progress=False)
    write_report(tmp_path / "page.html", tmp_path, select(tmp_path))
    assert "<img" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("Hallo 你", {"Latin": 0}),
        ("您", {"Han": 0}),
        ("…12", {"none": 0}),
        ("नमस्ते", {"Devanagari": 0}),
        ("A page of 5 μm that reads “שלום”", {"Latin": 0, "Hebrew": 27}),
        ("a sign “コーヒー 東京”", {"Latin": 0, "Katakana": 8, "Han": 13}),
    ],
)
def test_scripts_of(text, scripts):
    assert scripts_of(text) == scripts


def test_captions_are_shown_under_the_scripts_that_they_quote(tmp_path, picture, encoded):
    quoted = Caption("A photograph of a wall. " * 40 + "In its middle stands “שלום עולם”", "text", "en")
    write_shards(tmp_path, [Record("0", encoded(picture(0, (64, 48))), (quoted,), "s")], records_per_shard=8)
    score(tmp_path, workers=1, progress=False)
    selection = select(tmp_path, Thresholds(min_side=30, min_compressed=0))
    write_report(tmp_path / "page.html", tmp_path, selection)
    table = (tmp_path / "page.html").read_text(encoding="utf-8").split("<h2>Captions</h2>")[1]
    hebrew, latin = (
        next(row for row in table.split("<tr>") if row.startswith(f"<td>{name}<")) for name in ("Hebrew", "Latin")
    )
    assert "In its middle stands “שלום עולם”" in hebrew and "שלום" not in latin and len(latin) < 700


def test_near_duplicates_are_shown_beside_the_record_kept_in_their_place(tmp_path, picture, encoded):
    image = picture(1, (96, 64))
    copies = {"a<b>.png": image.resize((90, 60)), "large.png": image, "other.png": picture(2, (96, 64))}
    records = [Record(key, encoded(copy), (Caption("a red boat"),), "s") for key, copy in copies.items()]
    write_shards(tmp_path, records, records_per_shard=8)
    score(tmp_path, workers=1, progress=False)
    write_report(tmp_path / "page.html", tmp_path, select(tmp_path, Thresholds(min_side=30)))
    shown = (tmp_path / "page.html").read_text(encoding="utf-8").split("<h2>Duplicates</h2>")[1].split("<h2>")[0]
    assert "1 near duplicates were dropped" in shown and shown.count("<img") == 2
    assert "kept<br>large.png<br>96 x 64<" in shown and "dropped<br>a&lt;b&gt;.png<br>90 x 60<" in shown
