"""Selected records become samples once; edits keep their order, their geometry and their empty prompt."""

import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipeline.decoding.images import decode_image
from data_pipeline.loading.batch import collate, with_text
from data_pipeline.loading.mixture import layout_of
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.samples import encoding
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.held_out import HoldOut, image_hash, is_held
from data_pipeline.samples.prepare import prepare_image
from data_pipeline.samples.schema import NOTHING, TEXT, TEXT_AND_IMAGES, encode_sample
from data_pipeline.selection.index import Kept, Selection, read_selection, selection_facts, write_selection
from qi2_jax import sharding
from qi2_jax.inference import encoders, online
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.interop import components
from qi2_jax.runtime import lock
from qi2_jax.text.prompts import PromptProcessor
from qi2_jax.workflows.config import load_experiment

STAGE = "experiments/qwen_image_2/s3_512p_synthetic.py:tiny"
SIZES = [(200, 150), (150, 200), (140, 140), (70, 70), (400, 130)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, picture, encoded):
    """Five pairs and two edits with their selection; the last edit's second source is too long for any bucket."""
    made = []
    for index, size in enumerate(SIZES):
        texts = ("a picture", "another caption of it", "une image")[: 1 + index % 3]
        made.append(Record(f"{index}.png", encoded(picture(index, size)), tuple(map(Caption, texts)), "test"))
    alpha = picture(9, (160, 128)).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    for index, second in ((5, (128, 160)), (6, (700, 130))):
        sources = encoded(alpha), encoded(picture(index, second))
        captions = (
            Caption("a goal", "general"),
            Caption("put 2 behind 1", "instruction"),
            Caption("2 -> 1", "instruction"),
        )
        made.append(Record(f"{index}.png", encoded(picture(7, (160, 128))), captions, "test", conditions=sources))
    out = tmp_path_factory.mktemp("records")
    write_shards(out, made, records_per_shard=2)
    kept = []
    for index, record in enumerate(made):
        size = decode_image(record.image).image.size
        used = (1, 2) if record.conditions else tuple(range(len(record.captions)))
        kept.append(Kept(record.key, index, *size, used, len(record.conditions)))
    thresholds = load_experiment(STAGE).data.thresholds
    write_selection(out / "selection.parquet", Selection(thresholds, tuple(kept), {}, (), {}, {}, "of them"))
    return out


def test_selection_is_read_as_it_was_written(folder):
    kept = list(read_selection(folder / "selection.parquet"))
    assert [row.key for row in kept] == [f"{index}.png" for index in range(7)]
    assert kept[5] == Kept("5.png", 5, 160, 128, (1, 2), 2)
    assert selection_facts(folder / "selection.parquet")["thresholds"]["min_side"] == 64
    with pytest.raises(ValueError, match="run `qi2 data select` first"):
        list(read_selection(folder / "other.parquet"))


def run(folder, model, out, online=NOTHING, held_out=0.0, **changes):
    data = load_experiment(STAGE, [f"data.held_out={held_out}"]).data
    mesh = sharding.make_mesh(sharding.MeshShape(data=2), jax.devices()[:2])
    return encoding.encode(
        folder,
        folder / "selection.parquet",
        data.resolutions,
        encoders.Encoders(model, mesh, jnp.float32, 4, online),
        out,
        {**encoding.preprocessing(data), **encoders.digests(model), "online": online},
        **{"records_per_unit": 3, "progress": False, "held_out": HoldOut(RecordFolder(folder), held_out)} | changes,
    )


def content(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(folder, imported, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "samples"
    return out, run(folder, imported, out)


def test_a_second_program_is_refused_and_names_the_first(folder, imported, tmp_path):
    with (
        lock.exclusive(tmp_path),
        pytest.raises(ValueError, match=rf"another process works in .* \(process {os.getpid()} of"),
    ):
        run(folder, imported, tmp_path)
    assert not (tmp_path / "making.json").exists()


def test_every_record_enters_the_areas_that_it_fills_and_what_is_lost_is_counted(whole):
    out, report = whole
    assert report.streams == {"64-0": 5, "64-2": 1, "128-0": 4, "128-2": 1}
    assert report.left_out == {"condition_cropped_too_much": 2}
    assert {sample.record for sample in Cache(out).streams[2]} == {0, 1, 2, 4}
    assert json.loads((out / "manifest.json").read_text())["left_out"] == report.left_out


def test_held_out_samples_are_the_same_samples_in_separate_streams(whole, folder, imported, tmp_path):
    records = RecordFolder(folder)
    numbers = sorted({image_hash(image) for r in records for image in (r.image, *r.conditions)})
    held_out = numbers[2]  # the two lowest images
    report = run(folder, imported, tmp_path, held_out=held_out)
    expected = {
        (stream.key, sample.record): encode_sample(sample) for stream in Cache(whole[0]).streams for sample in stream
    }
    found = Cache(tmp_path)
    names = [str(stream.key) for stream in found.streams]
    assert any(name.endswith("-held") for name in names) and list(report.streams) == names
    made = [(stream.key, sample) for stream in found.streams for sample in stream]
    assert {(key._replace(held=False), s.record): encode_sample(s) for key, s in made} == expected
    assert all(key.held == is_held(records[sample.record], held_out) for key, sample in made)


def test_samples_are_what_the_pipeline_computes(whole, folder, imported):
    """Latents and features of one edit against `Pipeline`, which is compared with the published one elsewhere."""
    out, _ = whole
    pipeline = Pipeline.load(
        imported, dtype=jnp.float32, mesh=sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    )
    (sample,) = Cache(out).streams[3]
    record, data = RecordFolder(folder)[sample.record], load_experiment(STAGE).data
    buckets = data.resolutions.buckets(128)
    images = []
    for image in (*record.conditions, record.image):
        upright = decode_image(image).image
        images.append(Image.fromarray(prepare_image(upright, buckets.assign(*upright.size), 4)))
    for found, image in zip((*sample.conditions, sample.latents), images, strict=True):
        np.testing.assert_allclose(found, pipeline.encode(image), atol=1e-5)
    texts = [record.captions[1].text, record.captions[2].text, ""]
    for text, own in zip(texts, sample.all_texts, strict=True):
        grids = [pipeline._grid(*images[-1].size)]
        (prompt,) = pipeline._prompts([[text]], images[:2], grids)
        slots = np.cumsum([0, *prompt.layout.text])
        expected = [prompt.cond.text_BTE[0, a : a + n] for a, n in zip(slots, own.lengths, strict=False)]
        np.testing.assert_allclose(own.features, np.concatenate(expected), atol=1e-5)


def test_interrupted_and_shared_encoding_give_the_same_bytes(whole, folder, imported, tmp_path, monkeypatch):
    expected = content(whole[0])
    # The process dies in the second unit, when some of its samples are written.
    latents, calls = encoders.Encoders.latents, []

    def dies(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return latents(self, images)

    with monkeypatch.context() as patched:
        patched.setattr(encoders.Encoders, "latents", dies)
        with pytest.raises(KeyboardInterrupt):
            run(folder, imported, tmp_path / "killed")
    assert not (tmp_path / "killed" / "manifest.json").exists()
    run(folder, imported, tmp_path / "killed")
    assert content(tmp_path / "killed") == expected
    # Two processes with a unit each.
    assert run(folder, imported, tmp_path / "shared", process=(1, 2)) is None
    assert run(folder, imported, tmp_path / "shared", process=(0, 2)) is not None
    assert content(tmp_path / "shared") == expected


def test_a_cache_is_not_continued_with_other_data(whole, folder, imported):
    out, _ = whole
    data = load_experiment(STAGE).data
    with pytest.raises(ValueError, match=r"vae: .* expected 'another'"):
        Cache(out, {"vae": "another"})
    wider = load_experiment(STAGE, ["data.max_cropped=0.5"]).data
    with pytest.raises(ValueError, match=r"expected.*'held_out': 0\.25"):
        Cache(out, encoding.preprocessing(data))
    data = load_experiment(STAGE, ["data.held_out=0.0"]).data
    assert "held_out" not in encoding.preprocessing(data)["preprocessing"]  # as in caches from before there was the key
    Cache(out, encoding.preprocessing(data))
    with pytest.raises(ValueError, match=r"'max_cropped': 0\.25.*expected.*'max_cropped': 0\.5"):
        Cache(out, encoding.preprocessing(wider))


def test_online_samples_hold_images_whose_latents_are_the_cached_ones(whole, folder, imported, tmp_path):
    report = run(folder, imported, tmp_path, online=TEXT_AND_IMAGES)
    assert report.online == TEXT_AND_IMAGES and "online: text_and_images" in str(report.table().title)
    one_device = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    images = encoders.ImageEncoder.from_folder(imported, one_device, jnp.float32, 1)
    cached, online_ = Cache(whole[0]), Cache(tmp_path)
    for with_latents, with_pictures in zip(cached.streams, online_.streams, strict=True):
        assert with_latents.largest == with_pictures.largest
        for expected, found in zip(with_latents, with_pictures, strict=True):
            assert found.record == expected.record and found.latents.shape == (*expected.latents.shape[:2], 0)
            for made, own in zip(
                images.latents([found.target_pixels, *found.condition_pixels]),
                (expected.latents, *expected.conditions),
                strict=True,
            ):
                np.testing.assert_allclose(made, own, atol=1e-5)


def test_online_samples_hold_prompts_whose_features_are_the_cached_ones(whole, folder, imported, tmp_path):
    run(folder, imported, tmp_path, online=TEXT)
    one_device = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    encoder = encoders.load(imported, "text_encoder", one_device, jnp.float32)
    config = components.read_config(imported / "text_encoder", "text_encoder")
    processor = PromptProcessor.from_folder(imported / "processor", config)
    cached, online_ = Cache(whole[0]), Cache(tmp_path)
    for with_features, with_prompts in zip(cached.streams, online_.streams, strict=True):
        assert with_features.largest == with_prompts.largest
        layout = layout_of(with_features.largest, cached.empty.lengths)
        texts = [
            [with_text(sample, text) for sample in (stream[0], stream[-1 % len(stream)]) for text in sample.all_texts]
            for stream in (with_features, with_prompts)
        ]
        expected, batch = (collate(layout, own) for own in texts)
        assert batch.cond.text_BTE.shape[-1] == 0 and batch.samples == tuple(texts[1]) and expected.samples == ()
        prompts = [[sample.texts[0].prompt for sample in own] for own in texts]
        assert prompts[0] == prompts[1] and prompts[1][0] != "", "kept beside the features, too"
        rows = jax.tree.map(jnp.asarray, online.prompt_rows(processor, layout, batch.samples))
        found = online.text_features(encoder, rows)
        np.testing.assert_allclose(found, expected.cond.text_BTE, atol=1e-5)
        np.testing.assert_array_equal(batch.latents_BNC, expected.latents_BNC)
        for name in ("positions_BS3", "valid_BS"):
            np.testing.assert_array_equal(getattr(batch.cond, name), getattr(expected.cond, name))
    with pytest.raises(ValueError, match="contain text features"):
        online.prompt_rows(processor, layout, texts[0])
