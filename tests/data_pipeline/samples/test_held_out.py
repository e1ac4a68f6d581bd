"""A held-out image is never used for training: in no stream, area or stage, neither alone nor in an edit."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.samples.cache import Cache, held_out_rule
from data_pipeline.samples.encoding import encode, fingerprint, preprocessing
from data_pipeline.samples.held_out import BY_IMAGES, HoldOut, check_held_out, hold_out_of, image_hash, is_held
from data_pipeline.samples.schema import NOTHING, Text
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.index import Kept, Selection, write_selection
from qi2_jax.workflows.config import load_experiment

STAGES = [f"experiments/qwen_image_2/{name}.py:tiny" for name in ("s1_256p_t2i", "s3_512p_synthetic", "s4_1024p")]
SIZES = [(64 + 48 * (index % 4), 64 + 48 * (index % 4)) for index in range(12)]  # in areas from 64 to 128


class Encoders:
    """Returns arrays with the shapes of encoded images and texts, without content."""

    channels, online = 3, NOTHING

    def images_at_once(self, width, height):
        return 3

    def latents(self, images):
        return [np.zeros((image.shape[0] // 16, image.shape[1] // 16, 4), np.float32) for image in images]

    def texts(self, texts, images, max_patches=0):
        lengths = [(1,) * (len(own) + 1) for own in images]
        return [Text(np.zeros((sum(length), 2), np.float32), length) for length in lengths]


@pytest.fixture(scope="module")
def pictures(picture, encoded):
    return [encoded(picture(index, size)) for index, size in enumerate(SIZES)]


# Of each record its target and its condition images, by their numbers.
parts = st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=3)


@given(st.lists(parts, min_size=1, max_size=12), st.sampled_from([0.0, 0.1, 0.3, 0.6]))
@settings(max_examples=15, deadline=None)
def test_no_held_image_is_trained_on_in_any_stream_of_any_stage(pictures, made, held_out):
    records, kept = [], []
    for index, (target, *sources) in enumerate(made):
        caption = Caption("a text", "instruction" if sources else "general")
        conditions = tuple(pictures[source] for source in sources)
        records.append(Record(f"{index}", pictures[target], (caption,), "test", conditions=conditions))
        kept.append(Kept(f"{index}", index, *SIZES[target], (0,), len(sources)))
    trained, held = set(), set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, records, records_per_shard=4)
        for stage in STAGES:
            data = load_experiment(stage, [f"data.held_out={held_out}"]).data
            index, out = folder / "selection.parquet", folder / Path(stage).stem
            write_selection(index, Selection(data.thresholds, tuple(kept), {}, (), {}, {}, "of them"))
            rule = HoldOut(RecordFolder(folder), held_out)
            resolutions, how = data.resolutions, {"records_per_unit": 3, "held_out": rule}
            try:
                report = encode(folder, index, resolutions, Encoders(), out, preprocessing(data), **how, progress=False)
            except ValueError as error:
                assert "there are no samples" in str(error)  # all are too small for this stage
                continue
            for stream in Cache(out).streams:
                assert report.streams[str(stream.key)] == len(stream)
                (held if stream.key.held else trained).update(sample.record for sample in stream)
    assert not trained & held
    assert all(image_hash(pictures[part]) >= held_out for record in trained for part in made[record])
    assert all(any(image_hash(pictures[part]) < held_out for part in made[record]) for record in held)
    pairs = {pictures[made[record][0]] for record in held if len(made[record]) == 1}
    assert not pairs & {pictures[part] for record in trained for part in made[record]}


def test_numbers_are_uniform_and_a_larger_fraction_holds_what_a_smaller_one_holds():
    numbers = [image_hash(str(index).encode()) for index in range(4000)]
    assert max(abs(np.sort(numbers) - np.linspace(0, 1, 4000))) < 0.04
    caption = (Caption("a text"),)
    held = [
        {index for index in range(400) if is_held(Record("k", str(index).encode(), caption, "test"), fraction)}
        for fraction in (0.0, 0.1, 0.5)
    ]
    assert held[0] == set() < held[1] < held[2]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fractions_that_cannot_be_held_out_are_refused(fraction):
    with pytest.raises(ValueError, match=r"held_out is .*less than 1"):
        check_held_out(fraction)


@pytest.fixture(scope="module")
def copied(tmp_path_factory, picture, encoded):
    """Scored records of eight images, each with a smaller JPEG copy, and their selection."""
    folder = tmp_path_factory.mktemp("copied")
    records, kept = [], []
    for number in range(8):
        image = picture(number, (112, 112))
        for key, data, side in (
            ("original", encoded(image), 112),
            ("copy", encoded(image.resize((100, 100)), "JPEG", quality=90), 100),
        ):
            kept.append(Kept(f"{number} {key}", len(kept), side, side, (0,)))
            records.append(Record(kept[-1].key, data, (Caption("a picture"),), "test"))
    write_shards(folder, records, records_per_shard=5)
    score(folder, workers=1, progress=False)
    thresholds = load_experiment(STAGES[0]).data.thresholds
    write_selection(folder / "selection.parquet", Selection(thresholds, tuple(kept), {}, (), {}, {}, "of them"))
    return folder


def test_copies_are_held_out_together_and_the_cache_names_the_rule(copied, tmp_path):
    records, data = RecordFolder(copied), load_experiment(STAGES[0], ["data.held_out=0.4"]).data
    rule = hold_out_of(records, 0.4)
    made = fingerprint(records, copied / "selection.parquet", data, {}, rule.rule)
    how = {"records_per_unit": 3, "held_out": rule, "progress": False}
    encode(copied, copied / "selection.parquet", data.resolutions, Encoders(), tmp_path, made, **how)
    found = Cache(tmp_path, preprocessing(data))  # what a trainer checks
    held = {sample.record // 2 for stream in found.streams if stream.key.held for sample in stream}
    trained = {sample.record // 2 for stream in found.streams if not stream.key.held for sample in stream}
    assert held and trained and not held & trained and len(held | trained) == 8
    assert found.fingerprint["held_out_by"] == rule.rule == held_out_rule([tmp_path / "absent", tmp_path])
    with pytest.raises(ValueError, match=r"held_out_by: 'near-duplicate groups .*'"):
        Cache(tmp_path, made | {"held_out_by": "near-duplicate groups of other scores"})


def test_the_rule_of_earlier_caches_is_followed(copied, tmp_path, caplog):
    records = RecordFolder(copied)
    assert hold_out_of(records, 0.4, BY_IMAGES).rule == BY_IMAGES  # as in caches that record none
    assert hold_out_of(records, 0.0).rule == BY_IMAGES and not hold_out_of(records, 0.0).mask(range(16)).any()
    groups = hold_out_of(records, 0.4)
    assert hold_out_of(records, 0.4, groups.rule).rule == groups.rule
    with pytest.raises(
        ValueError, match=r"held out by near-duplicate groups x, but now near-duplicate groups .* would"
    ):
        hold_out_of(records, 0.4, "near-duplicate groups x")
    assert not (hold_out_of(records, 0.2).mask(range(16)) & ~groups.mask(range(16))).any()
    assert not caplog.text
    (tmp_path / "making.json").write_text(json.dumps({"preprocessing": {"held_out": 0.4}}))
    assert held_out_rule([tmp_path]) == BY_IMAGES
    (tmp_path / "making.json").write_text(json.dumps({"preprocessing": {}}))
    assert held_out_rule([tmp_path]) is None


def test_records_without_scores_are_held_out_by_their_images_and_a_warning_says_so(copied, tmp_path, caplog):
    write_shards(tmp_path, RecordFolder(copied), records_per_shard=5)
    found = hold_out_of(RecordFolder(tmp_path), 0.4)
    assert found.mask(range(16)).tolist() == [image_hash(record.image) < 0.4 for record in RecordFolder(tmp_path)]
    assert "has no groups of near duplicates" in caplog.text and "qi2 data score" in caplog.text
