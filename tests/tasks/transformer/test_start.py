"""A run gets the encoders that made its samples, and no others."""

import json
import logging
import shutil

import numpy as np
import pytest

from data_pipeline.samples.cache import Cache
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.inference import encoders
from qi2_jax.interop import folder
from qi2_jax.runs import paths
from qi2_jax.tasks.transformer import start
from qi2_jax.workflows.config import load_experiment
from tests.caches import write_cache

CONFIG = load_experiment("experiments/demo.py:tiny").transformer


def samples(path, made_from):
    def text(length):
        return Text(np.ones((length, 16), np.float32), (length,))

    write_cache(path, [(64, Sample(np.ones((2, 3, 64), np.float32), (text(4),)))], text(1), made_from)
    return Cache(path)


def test_run_gets_the_encoders_of_its_samples(imported, tmp_path):
    made = samples(tmp_path / "samples", encoders.digests(imported))
    for _ in range(2):  # again, as after an interruption
        start.prepare_model_folder(CONFIG, made, imported, tmp_path / "run")
        model = tmp_path / "run" / paths.MODEL
        assert (model / folder.MARK).is_file()
        assert encoders.digests(model) == encoders.digests(imported)


def test_run_gets_the_scheduler_of_its_start_and_says_so(imported, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    turbo = tmp_path / "turbo"
    shutil.copytree(imported, turbo)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False}
    (turbo / folder.SCHEDULER).write_text(json.dumps(scheduler))
    config = load_experiment("experiments/demo.py:tiny", [f"transformer.start.folder={turbo}"]).transformer
    made = samples(tmp_path / "samples", encoders.digests(imported))
    start.prepare_model_folder(config, made, imported, tmp_path / "run")
    schedule = folder.read_schedule(tmp_path / "run" / paths.MODEL)
    assert not schedule.shift.dynamic and schedule.shift.shift == 3.0 and schedule.terminal is None
    assert f"sampling and export keep the scheduler of {turbo}" in caplog.text


def test_other_encoders_are_refused(imported, tmp_path):
    made = samples(tmp_path / "samples", {**encoders.digests(imported), "vae": "of another one"})
    with pytest.raises(ValueError, match=r"\['vae'\] of .* did not make the samples"):
        start.prepare_model_folder(CONFIG, made, imported, tmp_path / "run")
    with pytest.raises(ValueError, match="not a complete model folder"):
        start.prepare_model_folder(CONFIG, made, tmp_path, tmp_path / "run")


def test_run_without_encoders_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    start.prepare_model_folder(CONFIG, samples(tmp_path / "samples", {}), None, tmp_path / "run")
    assert "can train, but not sample" in caplog.text
    assert not (tmp_path / "run").exists()
