"""Keys of a config file that nothing reads, or that are missing, are told by their paths."""

import ml_collections
import pytest

from qi2_jax.config import loading as configs
from qi2_jax.tasks import keys
from qi2_jax.tasks.transformer.config import check_transformer
from qi2_jax.workflows import encode

STAGE = "experiments/qwen_image_2/s2_256p_edits.py:tiny"


def check(change) -> None:
    config = ml_collections.ConfigDict(configs.load(STAGE))
    with config.unlocked():
        change(config)
    encode.check(config.encode)
    check_transformer(config.transformer, config.data)


@pytest.mark.parametrize(
    ("group", "key", "message"),
    [
        ("transformer", "emadecay", "transformer.emadecay', which nothing reads; did you mean 'ema_decay'"),
        ("transformer.train", "watchdog_secs", "transformer.train.watchdog_secs', .*did you mean 'watchdog_seconds'"),
        ("transformer.checkpoint", "keep_evry", "transformer.checkpoint.keep_evry', .*did you mean 'keep_every'"),
        ("transformer.optimizer", "warmup_steps", "transformer.optimizer.warmup_steps', which nothing reads"),
        ("transformer.model", "layer", "transformer.model.layer', .*did you mean 'layers'"),
        ("transformer.timesteps.shift", "max_shfit", "timesteps.shift.max_shfit', .*did you mean 'max_shift'"),
        ("data.thresholds", "min_brightnes", "data.thresholds.min_brightnes', .*did you mean 'min_brightness'"),
        ("data.mixture", "task", "data.mixture.task', .*did you mean 'tasks'"),
        ("encode", "dtyp", "encode.dtyp', .*did you mean 'dtype'"),
    ],
)
def test_a_misspelt_key_is_told_with_the_one_that_was_meant(group, key, message):
    def change(config):
        for part in group.split("."):
            config = config[part]
        config[key] = 1

    with pytest.raises(ValueError, match=message):
        check(change)


@pytest.mark.parametrize("path", ["transformer.optimizer.eps", "transformer.lora", "data.held_out", "encode.online"])
def test_a_missing_key_is_told(path):
    def change(config):
        *groups, key = path.split(".")
        for part in groups:
            config = config[part]
        del config[key]

    with pytest.raises(ValueError, match=f"config lacks the key '{path}'"):
        check(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(odrer=()), "has the key 'odrer', which nothing reads; did you mean 'order'"),
        (lambda config: config.corpus.update(edist=3), "has the key 'corpus.edist', .* did you mean 'edits'"),
        (lambda config: delattr(config.encoder, "seed"), "lacks the key 'encoder.seed'"),
        (lambda config: delattr(config.vae, "channels"), "lacks the key 'vae.channels'"),
    ],
)
def test_those_of_a_curriculum_are_told(change, message):
    config = ml_collections.ConfigDict(configs.load("experiments/qwen_image_2/curriculum.py:tiny"))
    with config.unlocked():
        change(config)
    with pytest.raises(ValueError, match=message):
        keys.check("", config, keys.CURRICULUM)


def test_keys_with_a_default_may_be_missing():
    def change(config):
        del config.transformer.model.eps

    check(change)
