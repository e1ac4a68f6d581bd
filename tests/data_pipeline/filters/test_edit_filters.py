"""Edit filters: exact pairs pass, spoilt ones are dropped for the right reason, and columns are correct."""

import re
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from data_pipeline.decoding.images import decode_image
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.edit_pair import COLUMNS, EDIT_PAIR
from data_pipeline.filters.instruction import named_sources, script_share
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from tests.data_pipeline.filters.spoilt_edits import compressed, encode, spoilt
from tests.data_pipeline.synthesis.test_edits import cutouts, edits  # noqa: F401  # fixtures

THRESHOLDS = Thresholds(min_side=30, drop_exact_duplicates=False, drop_near_duplicates=False)


def choose(folder, records):
    write_shards(folder, records, records_per_shard=512)
    score(folder, workers=1, progress=False)
    return select(folder, THRESHOLDS)


def test_exact_pairs_pass_even_if_compressed(edits, tmp_path):  # noqa: F811
    records = list(RecordFolder(edits[0]))
    twice = [*records, *(compressed(record) for record in records if "edit/restoration" not in record.tags)]
    selection = choose(tmp_path, twice)
    assert not selection.dropped and len(selection.kept) == len(twice)


def test_spoilt_pairs_are_dropped_for_the_right_reason(edits, tmp_path):  # noqa: F811
    records, rng = list(RecordFolder(edits[0]))[8:24], np.random.default_rng(0)
    wrong, deserved = [], {}
    for number, record in enumerate(records):
        scene = record.key.split(": ")[1].split(" + ")[0]
        other = next(edit for edit in records if scene not in edit.key)
        for what, reason, edit in spoilt(record, other, rng):
            key = f"{len(wrong)} {number} {what}"
            deserved[key] = what, reason
            wrong.append(Record(key, edit.image, edit.captions, "s", None, edit.conditions, edit.tags))
    dropped = choose(tmp_path, wrong).dropped
    found = Counter(), Counter(), Counter()
    for key, (what, reason) in deserved.items():
        found[0][what] += 1
        found[1][what] += key in dropped
        found[2][what] += key in dropped and dropped[key].reason == reason
    all_, any_, exact = found
    assert len(all_) == 14 and all_.total() > 80
    for what in all_:
        hard = what.endswith(("blurred", "recompressed", "JPEG 20"))  # these leave some images visibly unchanged
        assert any_[what] >= (0.5 if hard else 1.0) * all_[what], (what, any_[what], all_[what])
    assert any_.total() >= 0.93 * all_.total() and exact.total() >= 0.9 * any_.total(), (all_, any_, exact)


def columns(source: Image.Image, target: Image.Image) -> dict:
    images = [decode_image(encode(image)) for image in (target, source)]
    record = Record("k", b"x", (Caption("change it", "instruction"),), "s", conditions=(b"x",))
    return EDIT_PAIR.score([Candidate(record, images[0], None, (images[1],))])[0]


@pytest.fixture(scope="module")
def scene():
    from skimage import data

    return Image.fromarray(data.coffee()).crop((0, 0, 448, 320))


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(st.integers(-24, 24), st.integers(-24, 24))
def test_shift_is_measured(scene, right, down):
    moved = scene.crop((30 - right, 30 - down, 418 - right, 290 - down))
    found = columns(scene.crop((30, 30, 418, 290)), moved)
    assert found["shift"] == pytest.approx(np.hypot(right, down) / 388, abs=0.003)
    assert found["shared"] > 0.8


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(st.integers(30, 200), st.integers(30, 200), st.integers(0, 200), st.integers(0, 100))
def test_changed_share_is_measured_and_the_rest_is_equal(scene, width, height, left, top):
    target = scene.copy()
    patch = Image.effect_noise((width, height), 90).convert("RGB")
    target.paste(patch, (left, top))
    found = columns(scene, target)
    assert found["changed"] == pytest.approx(width * height / (448 * 320), abs=0.03)
    assert (found["unchanged_psnr"], found["shift"], found["aspect"], found["scale"]) == (99.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_pairs_of_two_sizes_are_compared_as_well(scene, factor):
    smaller = scene.resize((round(448 * factor), round(320 * factor)), Image.Resampling.LANCZOS)
    found = columns(scene, smaller)
    assert found["scale"] == factor and found["shared"] > 0.95 and found["shift"] == 0 and found["changed"] == 0


def test_flat_and_tiny_images_have_scores_too():
    for size in ((300, 200), (3, 2), (1, 1), (400, 5)):
        found = columns(Image.new("RGB", size, "red"), Image.new("RGB", size, "blue"))
        assert found.keys() == COLUMNS.keys() and found["shared"] is None and found["changed"] == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Put the cat of image 1 into image 2", {1, 2}),
        ("images 1, 2 and 3", {1, 2, 3}),
        ("Images 2-4", {2, 3, 4}),
        ("images 1,2 and image 1.5, image 1,234", {1, 2}),
        ("<image2> beside picture two", {2}),
        ("Take the second photo and the 3rd picture", {2, 3}),
        ("the second picture from the left", set()),
        ("图3和图二,第1张图片", {1, 2, 3}),
        ("把这张图2个人去掉", set()),
        ("write 'Figure 7' and \"Image 9\" and “图8”", set()),
        ("two images of 1985, image 1985, photo taken 12:30", set()),
        ("Bild 2 und im dritten Bild", {2, 3}),
        ("이미지 3, 두 번째 사진", {2, 3}),
        ("1枚目の画像と写真2", {1, 2}),
        ("изображение 2 и на третьем фото", {2, 3}),
        ("la segunda imagen y la imagen 1", {1, 2}),
        ("Remove the red kangaroo.", set()),
    ],
)
def test_named_sources(text, named):
    assert named_sources(text) == named


@hypothesis.given(
    st.lists(st.integers(1, 10), min_size=1, max_size=4, unique=True),
    st.sampled_from(["image {}", "图{}", "Picture {}", "photo #{}", "画像{}"]),
)
def test_all_named_sources_are_found(numbers, form):
    assert named_sources(", ".join(form.format(number) for number in numbers)) == set(numbers)


@pytest.mark.parametrize(
    ("text", "language", "low", "high"),
    [
        ("Make it blue.", "en", 1, 1),
        ("把它变成蓝色", "en", 0, 0),
        ("把它变成蓝色", "zh-Hans", 1, 1),
        ("把 logo 换成 Photoshop", "zh", 0.4, 0.6),
        ('把文字改成"OPEN ALL DAY"', "zh", 1, 1),
        ("青い空にしてください", "ja", 1, 1),
        ("Сделай небо синим", "ru", 1, 1),
        ("Učini nebo plavim", "sr-Latn", 1, 1),
        ("Сделай небо синим", "de", 0, 0),
        ("اجعل السماء زرقاء", "ar", 1, 1),
    ],
)
def test_script_of_a_claimed_language(text, language, low, high):
    assert low <= script_share(text, language) <= high


def test_scripts_of_unknown_languages_are_not_judged():
    assert script_share("Make it blue.", None) is None and script_share("abc", "tlh") is None
    assert script_share("123 !", "en") is None


def test_edits_of_no_class_are_judged_leniently(picture, tmp_path):
    turn = (Caption("make it night and let it snow", "instruction", "en"),)
    before, after = encode(picture(1)), encode(picture(2))
    two = (Caption("put image 1 before image 3", "instruction", "en"),)
    records = [
        Record("another style", after, turn, "s", conditions=(before,)),
        Record("nothing", before, turn, "s", conditions=(encode(picture(1), "BMP"),)),
        Record("missing", after, two, "s", conditions=(before, encode(picture(3)))),
        Record("twice", after, turn, "s", conditions=(encode(picture(4)), encode(picture(4), "BMP"))),
    ]
    dropped = choose(tmp_path, records).dropped
    reasons = {key: drop.reason for key, drop in dropped.items()}
    assert reasons == {
        "nothing": "nothing_changes",
        "missing": "names_missing_source",
        "twice": "repeated_source",
    }
    assert {drop.step for drop in dropped.values()} == {"edit", "captions"}
    assert all(re.fullmatch("[a-z_]+", reason) for reason in reasons.values())
