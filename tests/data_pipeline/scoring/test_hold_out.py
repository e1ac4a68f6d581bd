"""Copies and edits of an image share its hold-out number, whatever the order of the records."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from data_pipeline.filters.duplicates import thumbnail
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.samples.held_out import image_hash
from data_pipeline.scoring import hold_out
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.hold_out import Images, hold_out_numbers, read_numbers
from data_pipeline.scoring.orientations import canonical
from data_pipeline.scoring.pair_scores import read_pairs
from data_pipeline.scoring.pairs import FINGERPRINT, NEAR


def numbers_of(folder, records, per_shard=4) -> dict[str, float]:
    write_shards(folder, records, records_per_shard=per_shard)
    score(folder, workers=1, progress=False)
    return dict(zip([record.key for record in records], read_numbers(folder), strict=True))


def pair(key: str, image: bytes) -> Record:
    return Record(key, image, (Caption("a picture"),), "test")


def edit(key: str, image: bytes, *conditions: bytes) -> Record:
    return Record(key, image, (Caption(f"change {key}", "instruction"),), "test", conditions=conditions)


@pytest.fixture(scope="module")
def copies(picture, encoded):
    """Of each of six images the original, and copies that were compressed, made smaller, brighter, and cropped."""
    records = []
    for number in range(6):
        image = picture(number, (240, 200))
        cropped = image.crop((6, 5, 236, 196)).resize((240, 200))
        records += [
            pair(f"{number}-original", encoded(image)),
            pair(f"{number}-jpeg", encoded(image, "JPEG", quality=70)),
            pair(f"{number}-webp", encoded(image.resize((120, 100)), "WEBP", quality=80)),
            pair(f"{number}-bright", encoded(ImageEnhance.Brightness(image).enhance(1.15))),
            pair(f"{number}-cropped", encoded(cropped)),
        ]
    return records


def test_copies_that_the_pair_search_finds_share_their_number(tmp_path, copies):
    found = numbers_of(tmp_path / "one", copies)
    near = read_pairs(tmp_path / "one").near
    values = list(found.values())
    assert len(near) >= 4 * 6 and all(values[one["left"]] == values[one["right"]] for one in near)
    assert len(set(values)) == 6  # one of each image
    hashes = {image_hash(record.image) for record in copies}
    assert set(values) <= hashes
    order = np.random.default_rng(0).permutation(len(copies))
    assert numbers_of(tmp_path / "other", [copies[place] for place in order], per_shard=7) == found
    twice = [*copies, *(pair(f"again {record.key}", record.image) for record in copies[:12])]
    assert numbers_of(tmp_path / "twice", twice) == found | {f"again {key}": found[key] for key in list(found)[:12]}


TURNS = {
    "mirrored": Image.Transpose.FLIP_LEFT_RIGHT,
    "mirrored up and down": Image.Transpose.FLIP_TOP_BOTTOM,
    "turned by 90 degrees": Image.Transpose.ROTATE_90,
    "turned by 180 degrees": Image.Transpose.ROTATE_180,
    "turned by 270 degrees": Image.Transpose.ROTATE_270,
    "turned and mirrored": Image.Transpose.TRANSPOSE,
    "turned the other way and mirrored": Image.Transpose.TRANSVERSE,
}


@pytest.mark.parametrize("name", [*TURNS, "grey", "grey and mirrored", "mirrored and cropped"])
def test_turned_and_grey_copies_share_their_number_and_are_no_duplicates(tmp_path, picture, encoded, name):
    records = []
    for number in range(6):
        image = picture(number, (240, 200))
        copy = image.convert("L").convert("RGB") if "grey" in name else image
        if name != "grey":
            copy = copy.transpose(TURNS.get(name, Image.Transpose.FLIP_LEFT_RIGHT))
        if "cropped" in name:
            copy = copy.crop((6, 5, 236, 196))
        copy = copy.resize((180, 170))
        records += [pair(f"{number}", encoded(image)), pair(f"{number}-copy", encoded(copy, "JPEG", quality=70))]
    found = numbers_of(tmp_path, records)
    assert all(found[f"{number}"] == found[f"{number}-copy"] for number in range(6))
    assert len(set(found.values())) == 6
    assert not read_pairs(tmp_path).near.size  # `select` does not drop them


def test_turned_images_that_are_no_copies_keep_their_own_numbers(tmp_path, picture, encoded):
    """Other images, grey ones among them, and the same shapes in other colours."""
    images = {str(number): picture(number) for number in range(20)}
    images |= {f"grey {number}": picture(number).convert("L").convert("RGB") for number in range(20, 40)}
    red, green, blue = picture(0).convert("YCbCr").split()
    images["other colours"] = Image.merge("YCbCr", (red, blue, green)).convert("RGB").transpose(TURNS["mirrored"])
    found = numbers_of(tmp_path, [pair(key, encoded(image)) for key, image in images.items()], per_shard=30)
    assert len(set(found.values())) == len(images)


def test_an_edit_of_a_mirrored_image_is_held_out_with_it(tmp_path, picture, encoded):
    image, other = picture(0, (240, 200)), picture(1, (240, 200))
    source = encoded(image.transpose(TURNS["mirrored"]), "JPEG", quality=85)
    found = numbers_of(tmp_path, [pair("image", encoded(image)), edit("painted", encoded(other), source)])
    assert found["image"] == found["painted"]


def test_all_orientations_of_an_image_have_a_canonical_one_in_common(picture):
    for number in range(12):
        image = picture(number).resize((64, 64))
        seen = [image, *(image.transpose(turn) for turn in TURNS.values())]
        prints = np.zeros(len(seen), FINGERPRINT)
        prints["thumbnail"] = np.stack([np.frombuffer(thumbnail(one), np.uint8) for one in seen])
        at, entries = canonical(prints)
        assert set(at) == set(range(len(seen)))
        hashes = [set(entries["phash"][at == position].tolist()) for position in range(len(seen))]
        assert set.intersection(*hashes)


def test_an_image_without_copies_keeps_the_number_of_its_bytes(tmp_path, picture, encoded):
    records = [pair(str(number), encoded(picture(number))) for number in range(3)] + [pair("broken", b"no image")]
    found = numbers_of(tmp_path, records)
    assert found == {record.key: image_hash(record.image) for record in records[:3]} | {"broken": 1.0}


def test_edits_are_held_out_with_the_images_that_they_are_made_from(tmp_path, picture, encoded):
    image, other, alone = (picture(number, (240, 200)) for number in range(3))
    smaller, painted = image.resize((180, 150)), image.copy()
    painted.paste(other.resize((150, 130)), (60, 40))
    again = painted.copy()
    again.paste("red", (0, 0, 120, 120))
    records = [
        pair("image", encoded(image)),
        edit("painted", encoded(painted), encoded(smaller, "JPEG", quality=85)),
        edit("again", encoded(again), encoded(painted.resize((200, 166)), "WEBP", quality=85)),
        pair("copy of again", encoded(again, "JPEG", quality=80)),
        pair("other", encoded(other)),
        pair("alone", encoded(alone)),
    ]
    found = numbers_of(tmp_path / "edits", records)
    assert len({found[key] for key in ("image", "painted", "again", "copy of again")}) == 1
    assert len({found[key] for key in ("image", "other", "alone")}) == 3
    assert numbers_of(tmp_path / "reversed", records[::-1], per_shard=1) == found


def test_a_composition_follows_its_sources_and_does_not_join_them(tmp_path, picture, encoded):
    sources = [encoded(picture(number)) for number in range(4)]
    results = [encoded(picture(number)) for number in range(10, 13)]
    records = [pair(f"source {number}", source) for number, source in enumerate(sources)]
    records += [edit(f"result {number}", results[number], *sources[number : number + 2]) for number in range(3)]
    records.append(pair("copy", encoded(picture(10).resize((150, 140)), "JPEG", quality=90)))
    found = numbers_of(tmp_path, records)
    alone = [image_hash(source) for source in sources]
    assert [found[f"source {number}"] for number in range(4)] == alone
    for number in range(3):
        assert found[f"result {number}"] <= min(alone[number : number + 2])
    assert found["copy"] == found["result 0"]


def test_empty_canvases_do_not_join_what_is_painted_on_them(tmp_path, picture, encoded):
    canvas = encoded(Image.new("RGB", (200, 200), "white"))
    found = numbers_of(
        tmp_path, [edit(str(number), encoded(picture(number, (200, 200))), canvas) for number in range(4)]
    )
    assert len(set(found.values())) == 4


def test_numbers_are_computed_once_and_again_when_they_are_stale(tmp_path, picture, encoded, monkeypatch):
    numbers_of(tmp_path, [pair(str(number), encoded(picture(number))) for number in range(3)])
    assert not hold_out.score_hold_out(tmp_path, progress=False)
    before = [path.read_bytes() for path in hold_out.paths(tmp_path)]
    hold_out.paths(tmp_path)[0].write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"hold_out is damaged; delete it and run `qi2 data score"):
        read_numbers(tmp_path)
    monkeypatch.setattr(hold_out, "VERSION", 0)
    assert not hold_out.is_complete(tmp_path) and hold_out.score_hold_out(tmp_path, progress=False)
    monkeypatch.undo()
    assert hold_out.score_hold_out(tmp_path, progress=False)
    assert [path.read_bytes() for path in hold_out.paths(tmp_path)] == before


@given(st.lists(st.lists(st.integers(0, 8), min_size=0, max_size=4), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_numbers_are_those_of_joining_one_pair_after_another(made, data):
    """Images are numbered by their content; some contents are near."""
    contents = [content for images in made for content in images]
    count = len(contents)
    places = st.integers(0, max(0, count - 1))
    near = data.draw(st.lists(st.tuples(places, places), max_size=3)) if count else []
    digest = [hashlib.sha256(bytes([content])).digest() for content in contents]
    words = np.array([[int.from_bytes(one[:8], "big"), int.from_bytes(one[8:16], "big")] for one in digest], np.uint64)
    words = words.reshape(-1, 2)
    record = np.array([number for number, images in enumerate(made) for _ in images], np.int64)
    first = np.array([place == 0 for images in made for place, _ in enumerate(images)], bool)
    images = Images(record, first, words[:, 0], words, words, np.zeros(count, bool), np.zeros(count, bool))
    rows = np.zeros(len(near), NEAR)
    rows["left"], rows["right"] = zip(*near, strict=True) if near else ((), ())
    found = hold_out_numbers(images, rows, len(made))

    group = list(range(9))

    def join(one: int, other: int) -> None:
        old, new = group[one], group[other]
        group[:] = [new if name == old else name for name in group]

    for left, right in near:
        join(contents[left], contents[right])
    for sources in made:
        if len(sources) == 2:
            join(*sources)
    best = {}
    for content in sorted(set(contents)):
        code = hashlib.sha256(bytes([content])).digest()
        entry = [content] not in made, code[8:16], image_hash(bytes([content]))
        best[group[content]] = min(best.get(group[content], entry), entry)
    number = {name: value for name, (*_, value) in best.items()}
    for _ in made:
        for target, *sources in (images for images in made if len(images) > 2):
            lowest = min(number[group[source]] for source in sources)
            number[group[target]] = min(number[group[target]], lowest)
    assert found.tolist() == [min((number[group[one]] for one in images), default=1.0) for images in made]
