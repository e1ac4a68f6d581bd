"""A cache returns the samples that were written, and is refused if it is incomplete or was encoded from other data."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.funnel import Tally
from data_pipeline.samples import cache, lengths
from data_pipeline.samples.cache import Cache, StreamKey
from data_pipeline.samples.lengths import TextLengths
from data_pipeline.samples.schema import Sample, Text, decode_sample, encode_sample
from tests.caches import write_cache

EMPTY = Text(np.full((2, 3), -1, np.float32), (2,))


def make(index: int, conditions: int = 0, texts: int = 1, dtype=np.float32) -> Sample:
    """A sample in which every number identifies the sample."""

    def text(value):
        lengths = tuple(1 + (index + place) % 3 for place in range(conditions + 1))
        prompt = f"第{index}\n" * (index % 3)  # of every third sample none
        return Text(np.full((sum(lengths), 3), value).astype(dtype), lengths, prompt or None)

    sources = tuple(np.full((1 + place, 2, 4), index, np.float32) for place in range(conditions))
    empty = text(-index) if conditions else None
    latents = np.full((2 + index % 2, 3, 4), index, np.float32)
    return Sample(latents, tuple(text(index + place) for place in range(texts)), sources, empty, record=index)


def assert_equal(found: Sample, expected: Sample) -> None:
    assert found.record == expected.record and len(found.texts) == len(expected.texts)
    np.testing.assert_array_equal(found.latents, expected.latents)
    for one, other in zip(found.all_texts, expected.all_texts, strict=True):
        assert (
            one.lengths == other.lengths and one.prompt == other.prompt and one.features.dtype == other.features.dtype
        )
        np.testing.assert_array_equal(one.features, other.features)
    for one, other in zip(found.conditions, expected.conditions, strict=True):
        np.testing.assert_array_equal(one, other)


@given(st.integers(0, 99), st.integers(0, 3), st.integers(1, 3), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=20, deadline=None)
def test_stored_sample_is_the_same_sample(index, conditions, texts, dtype):
    sample = make(index, conditions, texts, np.dtype(dtype))
    assert_equal(decode_sample(encode_sample(sample)), sample)


@pytest.mark.parametrize("payload", [b"", b"\x00" * 8, b"\xff" * 64, encode_sample(make(1))[:-5]])
def test_hostile_payloads_are_an_error(payload):
    with pytest.raises(ValueError, match="stored sample"):
        decode_sample(payload)


def write(folder, units=3):
    """Writes units of pairs at 64; every second unit also has an edit at 128."""
    cache.begin(folder, {"vae": "a", "sides": (64, 128)})
    for unit in range(units):
        made = [(64, make(10 * unit + place)) for place in range(4)]
        made += [(128, make(10 * unit + 5, conditions=2, texts=2))] * (unit % 2)
        cache.write_unit(folder, unit, iter(made), Tally({"cropped_too_much": unit}))


def test_streams_hold_the_samples_of_all_units_in_order(tmp_path):
    write(tmp_path)
    assert cache.finish(tmp_path, 3, EMPTY)
    found = Cache(tmp_path, {"sides": (64, 128)})
    assert [stream.key for stream in found.streams] == [StreamKey(64, 0), StreamKey(128, 2)]
    assert [sample.record for sample in found.streams[0]] == [
        10 * unit + place for unit in range(3) for place in range(4)
    ]
    assert_equal(found.streams[1][0], make(15, conditions=2, texts=2))
    assert found.left_out == {"cropped_too_much": 3} and len(found) == 13
    largest = found.streams[1].largest
    assert (largest.target, largest.text, largest.conditions) == (9, (1, 2, 3), (2, 4))
    assert found.streams[0].largest.text == (3,)
    with pytest.raises(IndexError):
        found.streams[0][12]


def test_held_out_samples_have_separate_streams_and_older_caches_are_read(tmp_path):
    made = [(64, make(0)), (64, make(1), True), (64, make(2), False), (64, make(4, conditions=1), True)]
    write_cache(tmp_path, made, EMPTY, {"preprocessing": {"held_out": 0.5}})
    found = Cache(tmp_path)
    assert found.held_out == 0.5
    records = {str(stream.key): [sample.record for sample in stream] for stream in found.streams}
    assert records == {"64-0": [0, 2], "64-0-held": [1], "64-1-held": [4]}
    manifest = json.loads((tmp_path / cache.MANIFEST).read_text())
    old = [{k: v for k, v in stream.items() if k != "held"} for stream in manifest["streams"] if not stream["held"]]
    before = manifest | {"schema": 3, "fingerprint": {"preprocessing": {"version": 1}}, "streams": old}
    (tmp_path / cache.MANIFEST).write_text(json.dumps(before))
    found = Cache(tmp_path)
    assert found.held_out == 0 and [stream.key for stream in found.streams] == [StreamKey(64, 0)]
    assert [sample.record for sample in found.streams[0]] == [0, 2]


def test_unfinished_or_other_caches_are_refused(tmp_path):
    write(tmp_path, units=2)
    assert not cache.finish(tmp_path, 3, EMPTY)
    with pytest.raises(ValueError, match="no complete samples"):
        Cache(tmp_path)
    with pytest.raises(ValueError, match="vae: 'a', expected 'b'"):
        cache.begin(tmp_path, {"vae": "b", "sides": (64, 128)})
    cache.finish(tmp_path, 2, EMPTY)
    with pytest.raises(ValueError, match=r"sides: \[64, 128\], expected \[64\]"):
        Cache(tmp_path, {"sides": (64,)})
    manifest = json.loads((tmp_path / cache.MANIFEST).read_text())
    manifest["streams"][0]["files"][0]["file"] = "../../elsewhere"
    (tmp_path / cache.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="names files that are"):
        Cache(tmp_path)


def test_a_cache_without_a_sample_is_an_error_that_says_what_was_left_out(tmp_path):
    cache.begin(tmp_path, {})
    cache.write_unit(tmp_path, 0, iter(()), Tally({"upscaled_too_much": 7}))
    with pytest.raises(ValueError, match="'upscaled_too_much': 7"):
        cache.finish(tmp_path, 1, EMPTY)


def test_a_file_that_was_cut_is_named(tmp_path):
    write(tmp_path)
    cache.finish(tmp_path, 3, EMPTY)
    path = tmp_path / "64-0" / "unit-00001.arrayrecord"
    path.write_bytes(path.read_bytes()[:-70_000])
    with pytest.raises(ValueError, match="unit-00001"):
        Cache(tmp_path).streams[0][5]


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_OPEN", 2)
    write(tmp_path, units=5)
    cache.finish(tmp_path, 5, EMPTY)
    stream = Cache(tmp_path).streams[0]
    for index in (0, 19, 5, 9, 0, 13):
        assert stream[index].record == 10 * (index // 4) + index % 4
        assert len(stream._open) <= 2


@pytest.mark.parametrize("manifest", ['{"schema": 2, "shards": []}', "[]", "{", '{"schema": 99}'])
def test_a_folder_with_another_manifest_is_refused(tmp_path, manifest):
    (tmp_path / cache.MANIFEST).write_text(manifest)
    with pytest.raises(ValueError, match=r"is not the manifest of encoded samples .*name a folder"):
        Cache(tmp_path)


def test_text_lengths_are_stored_and_measured_where_an_earlier_version_did_not(tmp_path):
    write(tmp_path, 4)
    cache.finish(tmp_path, 4, EMPTY)
    stream = Cache(tmp_path).streams[1]
    assert len(stream.paths) == 2
    expected = TextLengths.of(stream)
    assert expected.has_conditions and expected.choices(np.arange(len(stream))).tolist() == [2] * len(stream)
    stored = sorted(path.name for path in stream.paths[0].parent.glob("*.lengths"))
    assert stored == [f"{path.stem}.lengths" for path in stream.paths]
    for path in stream.paths[1:]:
        path.with_suffix(".lengths").unlink()
    for _ in range(2):
        found = Cache(tmp_path).streams[1].lengths
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.texts, expected.texts)
    assert sorted(path.name for path in stream.paths[0].parent.glob("*.lengths")) == stored


def test_damaged_text_lengths_are_named(tmp_path):
    write(tmp_path)
    cache.finish(tmp_path, 3, EMPTY)
    second = Cache(tmp_path).streams[0].paths[1]
    second.with_suffix(".lengths").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"unit-0000\d.lengths: .*delete it, and it is measured again"):
        _ = Cache(tmp_path).streams[0].lengths
    shorter = TextLengths.of([make(0)])
    lengths.write(second, shorter)
    with pytest.raises(ValueError, match="samples, but lengths of 1; delete the latter"):
        _ = Cache(tmp_path).streams[0].lengths
