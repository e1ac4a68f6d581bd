"""The autoencoder's run: validation on held-out images, and a drawing of them beside their reconstructions."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.buckets import Bucket
from data_pipeline.filters import description
from data_pipeline.loading.crops import SelectedImage, SelectedImages
from data_pipeline.records.schema import Caption, Line, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.samples.held_out import image_hash
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.score_tables import write_scores
from qi2_jax.tasks.autoencoder import batches, task, validation
from qi2_jax.tasks.autoencoder.task import train_vae
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment

SIDE = 64
LINE = Line("text", (10, 20, 34, 30))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    def encoded(seed):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(buffer, "PNG")
        return buffer.getvalue()

    folder = tmp_path_factory.mktemp("records")
    records = [
        Record(f"{i}", encoded(i), (Caption("x"),), "test")
        if i % 3
        else Record(f"{i}", encoded(i), (Caption("x"),), "test", tags=("synthetic/glyphs",), lines=(LINE,))
        for i in range(12)
    ]
    for number, shard in enumerate(write_shards(folder, records, records_per_shard=6)):
        part = records[6 * number : 6 * number + 6]
        rows = [description._score(record) for record in part]
        write_scores(folder, description.DESCRIPTION, shard, [record.key for record in part], rows)
    return SelectedImages(RecordFolder(folder), tuple(SelectedImage(i, Bucket(SIDE, SIDE), (0,)) for i in range(12)), 4)


def test_validation_reads_the_images_that_the_rule_of_the_samples_holds_out(images, caplog):
    caplog.set_level("INFO")
    numbers = [image_hash(images.record(index).image) for index in range(12)]
    expected = [index for index in range(12) if numbers[index] < 0.5]
    assert 1 < len(expected) < 12

    def split(fraction):
        return [[image.index for image in part.chosen] for part in batches.split_held_out(images, fraction)]

    assert split(0.5) == [[index for index in range(12) if index not in expected], expected]
    assert split(0.0) == split(min(numbers)) == [[*range(12)], [*range(12)]]
    assert batches.split_held_out(images, 0.0)[0].digest == images.digest  # so that runs of before can be resumed
    assert "none of 12 images is held out" in caplog.text and "has no groups of near duplicates" in caplog.text
    with pytest.raises(ValueError, match=r"all 12 images are held out"):
        split(0.9999999)


def test_kinds_in_use_take_turns_in_validation(images):
    form = "experiments/qwen_image_2/autoencoder.py:tiny"

    def chosen(images, *changes):
        config = load_experiment(form, [f"vae.{change}" for change in changes]).vae
        found, kinds = validation.choose(config, images)
        assert kinds == ["photographs" if image.index % 3 else "synthetic" for image in found.chosen]
        return [image.index for image in found.chosen]

    assert chosen(images) == [1, 0, 2, 3, 4, 6, 5, 9, 7, 8, 10, 11]  # photographs, synthetic, ...
    assert chosen(images, "validation.images=5") == [1, 0, 4, 6, 8]
    unused = "shares.synthetic=0", "later_phases.at_48.shares.synthetic=0"
    assert chosen(images, *unused) == [1, 2, 4, 5, 7, 8, 10, 11]
    small = dataclasses.replace(images.chosen[0], bucket=Bucket(SIDE, 16))
    assert chosen(dataclasses.replace(images, chosen=(small, *images.chosen[1:])))[1] == 3
    plain = tiny()
    many = dataclasses.replace(images, chosen=tuple(SelectedImage(i, Bucket(SIDE, SIDE), ()) for i in range(40)))
    found, kinds = validation.choose(plain, many)  # without the key `validation.images`, as earlier configs
    assert [image.index for image in found.chosen] == [40 * i // 16 for i in range(16)] and kinds == [""] * 16
    with pytest.raises(
        ValueError, match=r"0 of the 1 images for validation have sides of at least 32 pixels; choose a sm"
    ):
        validation.choose(plain, dataclasses.replace(images, chosen=(small,)))


def test_copies_of_held_out_images_are_not_trained_on(images, tmp_path):
    made = []
    for number in range(12):
        made.append(images.record(number).image)
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(made[-1])) as image:
            image.resize((SIDE + 10, SIDE + 10)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    write_shards(tmp_path, [Record(f"{i}", one, (), "test") for i, one in enumerate(made)], records_per_shard=7)
    score(tmp_path, workers=1, progress=False)
    chosen = tuple(SelectedImage(i, Bucket(SIDE, SIDE), ()) for i in range(24))
    trained, held = batches.split_held_out(SelectedImages(RecordFolder(tmp_path), chosen, 4), 0.5)
    groups = [{image.index // 2 for image in part.chosen} for part in (trained, held)]
    assert len(trained) + len(held) == 24 and not groups[0] & groups[1] and all(groups)
    built = task.make_task(tiny(), trained, task.make_mesh(tiny().mesh), 0.5)
    assert len(built.crops.phases[0].streams[0][0].indices) == len(trained)  # nothing of it is held out


def tiny():
    model = (
        "encoder_width=4",
        "decoder_width=4",
        "latent_channels=8",
        "multipliers=(1,1)",
        "halves_time=(True,)",
        "patch_size=1",
    )
    run = ("batch_size=2", "statistics_batches=1", "train.steps=2", "train.sinks=()")
    overrides = [*(f"vae.model.{change}" for change in model), *(f"vae.{change}" for change in run)]
    return load_experiment("experiments/demo.py:tiny", overrides).vae


def test_a_run_validates_and_draws_before_the_first_and_after_the_last_step(images, tmp_path):
    train_vae(tiny(), images, tmp_path / "vae", tmp_path / "model", held_out=0.5)
    lines = [line for line in metrics.lines(tmp_path / "vae" / metrics.FILE) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [0, 2]
    names = {"step", "validation_loss", "validation_psnr", "validation_loss/raw", "validation_psnr/raw"}
    assert all(line.keys() == names for line in lines)
    assert lines[0]["validation_loss"] == lines[0]["validation_loss/raw"] != lines[1]["validation_loss/raw"]
    drawn = {path.name for path in (tmp_path / "vae" / "samples").iterdir()}
    assert drawn == {f"reconstructions-{step}.{kind}" for step in (0, 2) for kind in ("png", "json")}
    notes = json.loads((tmp_path / "vae" / "samples" / "reconstructions-2.json").read_text())
    held_out = [image.index for image in batches.split_held_out(images, 0.5)[1].chosen]
    assert [sample["record"] for sample in notes["samples"]] == held_out[: batches.DRAWN_IMAGES]
    with Image.open(tmp_path / "vae" / "samples" / "reconstructions-2.png") as grid:
        assert grid.width > 2 * SIDE and grid.height > len(notes["samples"]) // 2 * SIDE


def test_validation_does_not_depend_on_how_its_images_are_batched(images):
    config = tiny()
    made = task.make_task(config, images, task.make_mesh(config.mesh), 0.5)
    model = made.make_model(task.jax.random.key(0))
    chosen, kinds = validation.choose(config, images)
    checked, values = [], []
    for batch_size, count in ((2, 6), (4, 3), (16, 1)):
        larger = dataclasses.replace(config, batch_size=batch_size)
        held_out = validation.held_out(larger, chosen, kinds, made.mesh)
        assert len(held_out.batches) == count and held_out.batches[0].dtype == np.uint8
        values.append(made._validate(model, made.frozen, held_out, lambda: checked.append(1)))
    assert len(checked) == 6 + 3 + 1
    for found in values[1:]:
        for name, expected in values[0].items():
            assert expected.shape == (12,)
            np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_metrics_of_kinds_are_means_over_their_images():
    values = {"loss": np.float32([1, 2, 6]), "psnr": np.float32([30, 20, 40])}
    assert validation.report(values, ["", "", ""], "/raw") == {"validation_loss/raw": 3, "validation_psnr/raw": 30}
    assert validation.report(values, ["text", "photographs", "text"], "") == {
        "validation_loss": 3,
        "validation_psnr": 30,
        "validation_loss/photographs": 2,
        "validation_psnr/photographs": 20,
        "validation_loss/text": 3.5,
        "validation_psnr/text": 35,
    }
