"""`qi2 train` of an autoencoder: from records to a run and a model folder."""

import json
import pathlib
import subprocess
import sys

import pytest

from data_pipeline.scoring.cascade import score
from data_pipeline.selection.index import INDEX, read_selection
from qi2_jax.cli import main
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows import autoencoder
from qi2_jax.workflows.config import AutoencoderExperiment, load_experiment
from tests.tasks.autoencoder.test_task import images  # noqa: F401

ROOT = pathlib.Path(__file__).parents[2]
TINY = "experiments/qwen_image_2/autoencoder.py:tiny"
SMALL = (
    *("model.encoder_width=4", "model.decoder_width=4", "model.latent_channels=8", "model.multipliers=(1,1)"),
    *("model.halves_time=(True,)", "batch_size=2", "statistics_batches=1", "train.sinks=()", "train.log_every=1"),
    *("later_phases.at_48.start=2", "later_phases.at_48.batch_size=2"),
)
OVERRIDES = [f"vae.{change}" for change in SMALL]


@pytest.fixture(scope="module")
def records(images):  # noqa: F811
    score(images.records.folder, workers=1, progress=False)
    return images.records.folder


def test_a_run_is_trained_and_then_continued(records, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "qi2_jax", "train", TINY, "--data", str(records), "--out", str(out)]
    subprocess.run([*command, *OVERRIDES, "vae.train.steps=2"], cwd=ROOT, check=True, capture_output=True)
    first = (out / "model" / "vae" / "model.safetensors").read_bytes()
    assert len(list(read_selection(out / INDEX))) == 12
    autoencoder.train(load_experiment(TINY, [*OVERRIDES, "vae.train.steps=3"]), records, out)
    assert [line["step"] for line in metrics.lines(out / metrics.FILE) if "loss" in line] == [1, 2, 3]
    assert (out / "model" / "vae" / "model.safetensors").read_bytes() != first
    statistics = json.loads((out / "model" / "vae" / "config.json").read_text())
    assert len(statistics["latents_std"]) == 8


def test_a_selection_is_made_again_for_other_thresholds(records, tmp_path):
    index, shown = tmp_path / INDEX, []
    for thresholds in ((), (), ("data.thresholds.min_side=100",)):
        config = load_experiment(TINY, [*OVERRIDES, *thresholds])
        autoencoder._select(config.data, records, index, shown.append)
    assert len(shown) == 2 and not list(read_selection(index))
    with pytest.raises(ValueError, match=r"no image of .* is left after selection and buckets, see .*data\.thresholds"):
        autoencoder.train(config, records, tmp_path)


def test_what_is_not_a_folder_of_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder of records: `qi2 data ingest` makes one"):
        autoencoder.train(load_experiment(TINY), tmp_path, tmp_path / "run")


@pytest.mark.parametrize(
    ("experiment", "arguments", "message"),
    [
        (TINY, (), "trains an autoencoder: name its training data with --data"),
        (TINY, ("--samples", "x"), "trains an autoencoder: name its training data with --data"),
        (TINY, ("--data", "x", "--model", "y"), "trains an autoencoder, which --model is not for"),
        ("experiments/demo.py:tiny", (), "trains a transformer: name its training data with --samples"),
        ("experiments/demo.py:tiny", ("--samples", "x", "--data", "y"), "trains a transformer, which --data is not"),
    ],
)
def test_arguments_that_do_not_fit_the_experiment_are_refused(experiment, arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main.main(["train", experiment, *arguments, "--out", str(tmp_path / "run")])


def test_the_published_form_needs_only_its_weights():
    config = load_experiment("experiments/qwen_image_2/autoencoder.py")
    assert type(config) is AutoencoderExperiment
    assert (config.vae.model.encoder_width, config.vae.model.decoder_width) == (96, 144)
    assert config.vae.perceptual.weight > 0 and config.vae.alignment.network == "dinov2"
    with pytest.raises(ValueError, match=r"vae\.channels is 3; the autoencoder reads 4"):
        load_experiment(TINY, ["vae.channels=3"])
