"""A job refuses what cannot work before it begins, lets a folder be mended, and fails below what it expects."""

import json
import subprocess
import sys

import pytest

from qi2_jax.config import recorded
from qi2_jax.runtime import lock
from qi2_jax.workflows import demo as job
from qi2_jax.workflows import job_folder
from qi2_jax.workflows.config import ExpectConfig, load_experiment

TINY = "experiments/demo.py:tiny"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encode.dtype=float16", "encode.dtype is 'float16'; choose one of"),
        ("data.thresholds.max_aspect=0.5", "data.thresholds.max_aspect is 0.5; choose between"),
        ("data.sides=(8,)", "data: side 8 is below the grid"),
        ("vae.loss=sqared", "vae.loss is 'sqared'; choose one of"),
        ("data.thresholds.min_tokens=500", "data.thresholds.min_tokens is 500, above max_tokens 128"),
        ("data.channels=5", "data.channels is 5; the autoencoder reads 4"),
        ("data.workers=-1", "data.workers is -1"),
        ("encoder.heads=0", "encoder.heads 0 must be at least 1"),
        ("encoder.width=63", "width a multiple of 8 times"),
        ("encoder.layers=0", "encoder.layers 0"),
        ("encoder.seed=-1", "encoder.seed is -1"),
        ("encoder.folder=/nope", "encoder.folder: /nope is not a folder"),
        ("vae.seed=-1", "vae.seed is -1"),
        ("vae.crop=40", "vae.crop is 40; it must be a multiple of 16"),
        ("transformer.seed=-1", "transformer.seed is -1"),
        ("transformer.train.steps=0", "transformer.train.steps is 0"),
        ("transformer.model.heads=0", "transformer.model.heads is 0"),
        ("transformer.model.mlp_ratio=0", "transformer.model.mlp_ratio is 0"),
        ("transformer.model.eps=-1", "transformer.model.eps is -1"),
        ("transformer.timesteps.shift.max_tokens=256", "base_tokens 256 must be below max_tokens 256"),
        ("transformer.timesteps.logit_normal.std=-1", "logit_normal has mean 0.0 and std -1"),
        ("transformer.optimizer.warmup=900", "transformer.optimizer.warmup is 900; it must end before"),
        ("sample.seed=-1", "sample.seed is -1"),
        ("vae.mesh.data=3", "vae: a batch of 8 does not split"),
        ("vae.mesh.data=0", "vae.mesh: mesh data=0"),
        ("vae.optimizer.betas=(0.9,)", r"vae.optimizer.betas is \(0.9,\)"),
        ("transformer.timesteps.law=lognormal", "transformer.timesteps.law is 'lognormal'; choose one of"),
        ("transformer.timesteps.shift.kind=cubic", "time shift 'cubic' is unknown"),
        ("transformer.execution.kernel=fast", "transformer.execution.kernel is 'fast'; choose one of"),
        ("transformer.execution.dtype=half", "transformer.execution.dtype is 'half'; choose one of"),
        ("transformer.model.rope_dims=(8,8,8)", "must be even and add up"),
        ("encode.batch_size=0", "encode: a batch of 0 does not split"),
        ("data.mixture.tasks=(0,0)", "data.mixture has a negative share, or only shares of 0"),
        ("transformer.batch_sizes=(8,8)", "transformer.batch_sizes is .*; it needs one number for each of data.sides"),
        ("transformer.dropout=1.5", "transformer.dropout is 1.5; it must be a probability"),
        ("transformer.ema_decay=1.0", "transformer.ema_decay is 1.0"),
        ("transformer.optimizer.lr=1e999", "transformer.optimizer.lr is inf"),
        ("transformer.train.steps=-5", "transformer.train.steps is -5"),
        ("transformer.train.steps=1000", "transformer.train.steps is 1000, beyond optimizer.decay_steps"),
        ("transformer.checkpoint.keep=0", "transformer.checkpoint.keep is 0"),
        ("sample.batch_size=0", "sample.batch_size is 0"),
        ("sample.captions=-1", "sample.captions is -1"),
        ("compare.images=-1", "compare.images is -1"),
    ],
)
def test_values_that_a_later_step_would_refuse_are_refused_before_the_first(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        job.run(load_experiment(TINY, [override]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def is_usable(out, compilation_cache=""):
    return job_folder.is_usable(out, "job.json", compilation_cache)


def test_a_folder_in_which_a_job_was_killed_at_once_is_that_jobs(tmp_path):
    assert is_usable(tmp_path / "missing") and is_usable(tmp_path)
    (tmp_path / ".job.json.1.partial").touch()
    with lock.hold(tmp_path):
        assert is_usable(tmp_path)
    assert is_usable(tmp_path)
    (tmp_path / "thesis.tex").touch()
    assert not is_usable(tmp_path) and not is_usable(tmp_path / "thesis.tex")


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    program = f"""
import pathlib, sys
from qi2_jax.runtime import lock
with lock.hold(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"process {other.pid} of .* choose another --out"):
            job.run(load_experiment(TINY), tmp_path)
        other.kill()
    with lock.hold(tmp_path), lock.hold(tmp_path):
        pass


def test_without_diffusers_a_job_says_so_at_its_beginning(monkeypatch, tmp_path):
    monkeypatch.setattr("qi2_jax.evaluation.torch_process.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs \['torch', 'diffusers'\]; .* with compare.images=0"):
        job.run(load_experiment(TINY), tmp_path / "out")
    job.check(load_experiment(TINY, ["compare.images=0"]))


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_every_timestep_distribution_and_attention_rule_is_reached_from_the_command_line(distribution):
    job.check(
        load_experiment(
            TINY, [f"transformer.timesteps.law={distribution}", "transformer.model.attention=bidirectional"]
        )
    )


def test_a_job_may_be_changed_where_nothing_is_made_from_it_yet(tmp_path):
    keys = ("source", "data", "encoder", "vae", "transformer")
    path = tmp_path / "job.json"

    same = {key: {"seed": 0} for key in keys}

    def allowed() -> set[str]:
        free = set()
        for key in keys:
            path.write_text(json.dumps(same))
            try:
                recorded.claim(path, same | {key: {"seed": 1}}, job.may_change(tmp_path))
                free.add(key)
            except ValueError as error:
                assert f"{key}.seed: 0 -> 1" in str(error)
        return free

    assert allowed() == {"data", "encoder", "vae", "transformer"}
    (tmp_path / "transformer" / "model" / "text_encoder").mkdir(parents=True)
    assert allowed() == {"data", "vae", "transformer"}
    (tmp_path / "vae" / "checkpoints" / "3").mkdir(parents=True)
    assert allowed() == {"transformer"}
    (tmp_path / "transformer" / "checkpoints" / "3").mkdir(parents=True)
    assert allowed() == set()


def test_compiled_programs_do_not_make_a_folder_someone_elses(tmp_path):
    (tmp_path / "kept" / "compiled").mkdir(parents=True)
    assert is_usable(tmp_path, "kept/compiled") and not is_usable(tmp_path, "compiled")
    assert not is_usable(tmp_path)


@pytest.mark.parametrize(
    ("own", "difference", "message"),
    [
        (0.5, 0, "only 50% of the generated images"),
        (None, 3, "different images, by up to 3 of 255"),
        (1.0, 2, "different images"),
    ],
)
def test_job_fails_where_its_figures_are_worse_than_expected(own, difference, message):
    figures = {"samples_nearest_to_own_image": own, "largest_difference_to_pytorch": difference}
    expect = ExpectConfig(nearest_to_own=0.9, difference_to_pytorch=1)
    with pytest.raises(ValueError, match=message):
        job.check_expected(figures, expect)
    job.check_expected({"samples_nearest_to_own_image": 0.95, "largest_difference_to_pytorch": 1}, expect)
