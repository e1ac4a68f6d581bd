"""The autoencoder's run: validation on held-out images, and a drawing of them beside their reconstructions."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.buckets import Bucket
from data_pipeline.loading.crops import SelectedImage, SelectedImages
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.samples.held_out import image_hash
from qi2_jax.tasks.autoencoder import batches, task
from qi2_jax.tasks.autoencoder.task import train_vae
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment

SIDE = 64


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    def encoded(seed):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(buffer, "PNG")
        return buffer.getvalue()

    folder = tmp_path_factory.mktemp("records")
    write_shards(folder, [Record(f"{i}", encoded(i), (Caption("x"),), "test") for i in range(12)], records_per_shard=6)
    return SelectedImages(RecordFolder(folder), tuple(SelectedImage(i, Bucket(SIDE, SIDE), (0,)) for i in range(12)), 4)


def test_validation_reads_the_images_that_the_rule_of_the_samples_holds_out(images, caplog):
    caplog.set_level("INFO")
    numbers = [image_hash(images.record(index).image) for index in range(12)]
    expected = [index for index in range(12) if numbers[index] < 0.5]
    assert 1 < len(expected) < 12
    assert batches.held_out_indices(images, 0.5) == expected
    assert batches.held_out_indices(images, 0.5, 2) == expected[:2]
    assert batches.held_out_indices(images, 0.0, 3) == [0, 1, 2]
    assert batches.held_out_indices(images, min(numbers), 3) == [0, 1, 2]
    assert "none of the first 12 images is held out" in caplog.text


def tiny():
    model = ("encoder_width=4", "decoder_width=4", "latent_channels=8", "multipliers=(1,1)", "halves_time=(True,)")
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
    held_out = batches.held_out_indices(images, 0.5)
    assert [sample["record"] for sample in notes["samples"]] == held_out[: batches.DRAWN_IMAGES]
    with Image.open(tmp_path / "vae" / "samples" / "reconstructions-2.png") as grid:
        assert grid.width > 2 * SIDE and grid.height > len(notes["samples"]) // 2 * SIDE


def test_validation_does_not_depend_on_how_its_batch_is_filled_up(images):
    config = tiny()
    made = task.make_task(config, images, task.make_mesh(config.mesh), 0.5)
    model = made.make_model(task.jax.random.key(0))
    found = [made._validate(model, made.frozen, made.validation[:size], 2) for size in (2, 4)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
