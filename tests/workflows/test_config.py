"""Whole configs: what is misspelt, missing, of another type or out of range is named with its full path."""

import pytest

from qi2_jax.config import loading
from qi2_jax.config.parsing import parse
from qi2_jax.tasks.transformer.config import AdapterConfig
from qi2_jax.workflows.config import CurriculumExperiment, DemoExperiment, StageExperiment, load_experiment

STAGE = "experiments/qwen_image_2/s2_256p_edits.py:tiny"
CURRICULUM = "experiments/qwen_image_2/curriculum.py:tiny"


def changed(experiment, change) -> None:
    """Parses an experiment after a change of its keys."""
    values = loading.to_dict(loading.load(experiment))
    change(values)
    parse(CurriculumExperiment if experiment == CURRICULUM else StageExperiment, values)


def group_of(values, path):
    for name in path.split(".") if path else ():
        values = values[name]
    return values


@pytest.mark.parametrize(
    ("group", "key", "message"),
    [
        ("transformer", "emadecay", "unknown config key 'transformer.emadecay'; did you mean 'ema_decay'"),
        ("transformer.train", "watchdog_secs", "'transformer.train.watchdog_secs'; did you mean 'watchdog_seconds'"),
        ("transformer.checkpoint", "keep_evry", "'transformer.checkpoint.keep_evry'; did you mean 'keep_every'"),
        (
            "transformer.optimizer",
            "nesterov",
            "'transformer.optimizer.nesterov'; known keys: adam_lr, betas, clip",
        ),
        ("transformer.model", "layer", "'transformer.model.layer'; did you mean 'layers'"),
        (
            "transformer.timesteps.shift",
            "max_shfit",
            "'transformer.timesteps.shift.max_shfit'; did you mean 'max_sh",
        ),
        ("transformer.timesteps", "unifrom", "'transformer.timesteps.unifrom'; did you mean 'uniform'"),
        ("transformer.timesteps.uniform", "lo", "'transformer.timesteps.uniform.lo'; did you mean 'low'"),
        ("data.thresholds", "min_brightnes", "'data.thresholds.min_brightnes'; did you mean 'min_brightness'"),
        ("data.mixture", "task", "'data.mixture.task'; did you mean 'tasks'"),
        ("encode", "dtyp", "'encode.dtyp'; did you mean 'dtype'"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(group, key, message):
    with pytest.raises(ValueError, match=message):
        changed(STAGE, lambda config: group_of(config, group).update({key: 1}))


@pytest.mark.parametrize("path", ["transformer.optimizer.eps", "transformer.lora", "data.held_out", "encode.online"])
def test_a_missing_key_is_named(path):
    group, _, key = path.rpartition(".")
    with pytest.raises(ValueError, match=f"missing config key '{path}'"):
        changed(STAGE, lambda config: group_of(config, group).pop(key))


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("transformer.train", {"steps": "many"}, "transformer.train.steps is 'many'; it must be an integer"),
        ("transformer.train", {"steps": True}, "transformer.train.steps is True; it must be an integer"),
        ("transformer.train", {"sinks": "wandb"}, "transformer.train.sinks is 'wandb'; it must be a tuple"),
        ("transformer.train", {"steps": 0}, "transformer.train.steps is 0; it must be at least 1"),
        ("transformer.train", {"watchdog_seconds": float("nan")}, "train.watchdog_seconds is nan; it must be at least"),
        ("transformer.execution", {"remat": 1}, "transformer.execution.remat is 1; it must be true or false"),
        ("transformer.samples", {"prompts": (3,)}, r"transformer.samples.prompts\[0\] is 3; it must be a string"),
        ("transformer.model", {"rope_dims": (16, 16)}, r"transformer.model.rope_dims is \(16, 16\); it must have 3"),
        ("transformer", {"mesh": 8}, "transformer.mesh is 8; it must be a group of keys"),
        ("data", {"held_out": "none"}, "data.held_out is 'none'; it must be a number"),
        ("data", {"ratios": ("16x9",)}, "data: ratio '16x9' must be width:height"),
        ("encode", {"dtype": "half"}, r"encode.dtype is 'half'; choose one of \['bfloat16', 'float32'\]"),
        ("encode", {"online": "all"}, "encode.online is 'all'; choose one of"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(group, values, message):
    with pytest.raises(ValueError, match=message):
        changed(STAGE, lambda config: group_of(config, group).update(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(odrer=()), "unknown config key 'odrer'; did you mean 'order'"),
        (lambda config: config["corpus"].update(edist=3), "unknown config key 'corpus.edist'; did you mean 'edits'"),
        (lambda config: config["encoder"].pop("seed"), "missing config key 'encoder.seed'"),
        (lambda config: config["vae"].update(channels=3), "vae.channels is 3; the autoencoder reads 4: make"),
        (
            lambda config: group_of(config, "stages.s2_256p_edits.transformer.train").update(step=3),
            "unknown config key 'stages.s2_256p_edits.transformer.train.step'; did you mean 'steps'",
        ),
    ],
)
def test_keys_of_a_curriculum_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        changed(CURRICULUM, change)


def test_keys_with_a_default_may_be_missing():
    changed(STAGE, lambda config: config["transformer"]["model"].pop("eps"))
    changed(STAGE, lambda config: config.pop("compilation_cache"))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_unknown_platforms_are_refused(platform):
    with pytest.raises(ValueError, match=f"platform is '{platform}'; choose 'cpu', or ''"):
        load_experiment(STAGE, [f"platform={platform}"])


def test_groups_tell_which_experiment_a_file_is():
    assert type(load_experiment(STAGE)) is StageExperiment
    assert type(load_experiment("experiments/demo.py:tiny")) is DemoExperiment
    assert type(load_experiment(CURRICULUM)) is CurriculumExperiment


def test_what_is_recorded_is_what_was_typed():
    typed = loading.to_dict(loading.load("experiments/demo.py:tiny"))
    config = load_experiment("experiments/demo.py:tiny")
    assert config.as_typed == typed and config.transformer.as_typed == typed["transformer"]
    assert "in_channels" not in config.vae.as_typed["model"] and config.vae.model.in_channels == 4
    started = config.with_start("runs/first")
    assert started.transformer.start.folder == "runs/first"
    assert started.transformer.as_typed == typed["transformer"] | {"start": {"folder": "runs/first"}}


def test_the_timestep_distribution_is_the_chosen_one_with_its_arguments():
    overrides = ["transformer.timesteps.law=uniform", "transformer.timesteps.uniform.low=0.25"]
    distribution = load_experiment(STAGE, overrides).transformer.timesteps.law
    assert (type(distribution).__name__, distribution.low, distribution.high) == ("Uniform", 0.25, 1.0)


def test_rank_0_is_no_adapter():
    assert AdapterConfig(0, 16.0, ("blocks.*",)).adapter is None
    adapter = AdapterConfig(4, 16.0, ("blocks.*",)).adapter
    assert adapter is not None and (adapter.rank, adapter.scale) == (4, 4.0)
