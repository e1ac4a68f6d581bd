"""A job refuses what cannot work before it begins, lets a folder be mended, and fails below what it expects."""

import json

import ml_collections
import pytest

from qi2_jax import config as configs
from qi2_jax.job import main as job

TINY = "experiments/demo.py:tiny"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encode_dtype=float16", "dtype 'float16' is unknown; choose one of"),
        ("data.thresholds.max_aspect=0.5", "max_aspect is 0.5; choose between"),
        ("data.sides=(8,)", "side 8 is below the grid"),
        ("vae.loss=sqared", "loss 'sqared' of the autoencoder is unknown"),
        ("vae.batch_size=7", "vae: a batch of 7 does not split"),
        ("vae.mesh.data=0", "vae: mesh data=0"),
        ("vae.optimizer.betas=(0.9,)", "vae: optimizer.betas are"),
        ("transformer.timesteps.law=lognormal", "timesteps.law 'lognormal' is unknown"),
        ("transformer.timesteps.shift.kind=cubic", "time shift 'cubic' is unknown"),
        ("transformer.execution.kernel=fast", "kernel 'fast' is unknown"),
        ("transformer.execution.dtype=half", "dtype 'half' is unknown"),
        ("transformer.model.rope_dims=(8,8,8)", "must be even and add up"),
        ("transformer.dropout=1.5", "it is a probability"),
        ("transformer.ema_decay=1.0", "transformer: ema_decay is 1.0"),
        ("transformer.optimizer.lr=1e999", "transformer: optimizer.lr is inf"),
        ("transformer.train.steps=-5", "transformer: train.steps is -5"),
        ("transformer.train.steps=1000", "goes beyond optimizer.decay_steps"),
        ("transformer.checkpoint.keep=0", "checkpoint.keep is 0"),
        ("sample.batch_size=0", "sample.batch_size is 0"),
        ("sample.captions=-1", "sample.captions is -1"),
        ("compare.images=-1", "compare.images is -1"),
    ],
)
def test_values_that_a_later_step_would_refuse_are_refused_before_the_first(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        job.run(configs.load(TINY, [override]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_diffusers_a_job_says_so_at_its_beginning(monkeypatch, tmp_path):
    monkeypatch.setattr("qi2_jax.job.verify.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs \['torch', 'diffusers'\]; .* with compare.images=0"):
        job.run(configs.load(TINY), tmp_path / "out")
    job.check_config(configs.load(TINY, ["compare.images=0"]))


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_every_law_and_attention_rule_is_reached_from_the_command_line(law):
    job.check_config(
        configs.load(TINY, [f"transformer.timesteps.law={law}", "transformer.model.attention=bidirectional"])
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
                configs.claim(path, same | {key: {"seed": 1}}, job.may_change(tmp_path, keys))
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


@pytest.mark.parametrize(
    ("own", "difference", "message"),
    [(0.5, 0, "only 50% of the samples"), (None, 3, "up to 3 of 255 apart"), (1.0, 2, "other images")],
)
def test_job_fails_where_its_figures_are_worse_than_expected(own, difference, message):
    figures = {"samples_nearest_to_own_image": own, "largest_difference_to_pytorch": difference}
    expect = ml_collections.ConfigDict({"nearest_to_own": 0.9, "difference_to_pytorch": 1})
    with pytest.raises(ValueError, match=message):
        job.check(figures, expect)
    job.check({"samples_nearest_to_own_image": 0.95, "largest_difference_to_pytorch": 1}, expect)
