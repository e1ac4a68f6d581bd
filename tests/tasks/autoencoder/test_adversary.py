"""The adversarial phase: its loss by hand, and a run in which the decoder's head and the discriminator alone move."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qi2_jax.models import tree
from qi2_jax.models.vae import VAEConfig
from qi2_jax.tasks.autoencoder import adversary, balance
from qi2_jax.tasks.autoencoder.config import AdversarialConfig
from qi2_jax.tasks.autoencoder.networks import Networks
from qi2_jax.tasks.autoencoder.objective import Crop, Objective
from qi2_jax.tasks.autoencoder.task import train_autoencoder
from qi2_jax.tasks.autoencoder.trained_vae import TrainedVAE
from qi2_jax.training.checkpoints import contents
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment
from tests.tasks.autoencoder.test_task import images  # noqa: F401

NAMES = {f"adversarial/{name}" for name in ("generator", "discriminator", "weight", "real", "fake")} | {
    "reconstruction"
}
PHASE = AdversarialConfig(weight=0.5, start=2, levels=0, width=4)
MODEL = VAEConfig(4, 4, 8, (1,), 1, (), in_channels=3, out_channels=3, patch_size=4)
HEAD = ("decoder.norm_out.", "decoder.conv_out.")


def test_the_hinge_stops_where_the_logits_are_far_enough():
    real, fake = jnp.array([2.0, 0.5]), jnp.array([-2.0, 0.25])
    assert float(adversary.hinge(real, fake)) == pytest.approx(((0 + 0.5) / 2 + (0 + 1.25) / 2) / 2)


def test_the_gradients_of_both_sides_are_those_of_their_terms():
    """At the decoder's last layer, the adversarial gradient has the ratio of the config to the reconstruction's."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: TrainedVAE(MODEL, width=4, key=jax.random.key(0)))
    vae = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 8, shapes)
    judge, pixels = vae.discriminator, rng.uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    objective = Objective("absolute", adversarial=PHASE)
    batch, keys = Crop(pixels), jax.random.split(jax.random.key(0), 2)

    def both(vae):
        return objective.adversarial_loss(vae, Networks(), None, batch, keys)

    def parts(vae):
        rebuilt = vae.decode(jax.lax.stop_gradient(vae.encode(pixels).mean), clamp=False)
        fake = vae.discriminator(jax.lax.stop_gradient(rebuilt))
        hinge = adversary.hinge(vae.discriminator(pixels), fake)
        return jnp.mean(jnp.abs(rebuilt - pixels)), -jnp.mean(judge(rebuilt)), hinge

    @jax.jit
    def gradients(vae):
        values, back = jax.vjp(parts, vae)
        return jax.value_and_grad(both, has_aux=True)(vae), values, [back(tuple(row))[0] for row in jnp.eye(3)]

    ((value, found), whole), (error, generator, hinge), towards = jax.device_get(gradients(vae))
    whole, (plain, adversarial, discriminating) = tree.to_dict(whole), map(tree.to_dict, towards)
    length, last = np.linalg.norm(adversarial["decoder.conv_out.weight"]), "decoder.conv_out.weight"
    ratio = np.linalg.norm(found["adversarial/weight"] * adversarial[last]) / np.linalg.norm(plain[last])
    assert ratio == pytest.approx(0.5 * length / (length + balance.RATIO_EPSILON), rel=1e-3)
    assert value == pytest.approx(error + found["adversarial/weight"] * generator, rel=1e-5)
    for name, gradient in whole.items():
        if name.startswith(("decoder.", "post_quant_conv.")):
            expected = plain[name] + found["adversarial/weight"] * adversarial[name]
        else:
            expected = discriminating[name]  # zero but for the discriminator
            assert adversary.is_discriminator(name) or not expected.any()
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * max(1, np.abs(expected).max()), err_msg=name)
    assert found["adversarial/discriminator"] == pytest.approx(hinge, rel=1e-5)
    assert found["adversarial/generator"] == pytest.approx(-found["adversarial/fake"]) and hinge > 0
    assert found.keys() == NAMES | {"psnr"}


def config(*overrides, adversarial=PHASE):
    model = ("encoder_width=4", "decoder_width=4", "latent_channels=8")
    run = ("batch_size=2", "statistics_batches=1", "train.steps=4", "train.log_every=1", "train.sinks=()")
    changes = [*(f"model.{one}" for one in model), *run, "checkpoint.every=1", "checkpoint.keep=9"]
    made = load_experiment("experiments/demo.py:tiny", [f"vae.{one}" for one in (*changes, *overrides)]).vae
    optimizer = dataclasses.replace(made.optimizer, weight_decay=0.5, warmup=0)
    return dataclasses.replace(made, adversarial=adversarial, optimizer=optimizer)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("whole")
    train_autoencoder(config(), images, out, out / "model")
    return out


def stored(out, step, item="model"):
    return {name: weight.read() for name, weight in contents.weights(out / "checkpoints" / str(step), item).items()}


def test_the_phase_trains_the_head_and_the_discriminator_and_keeps_every_other_bit(whole):
    """With momentum left over and weight decay; before the phase, the discriminator is the one that does not change."""
    first, second, third, fourth = (stored(whole, step) for step in (1, 2, 3, 4))
    for name, before in second.items():
        if name.startswith("discriminator."):
            assert first[name].tobytes() == before.tobytes(), name
        elif name.endswith("weight"):
            assert not np.array_equal(first[name], before), name
        if name.startswith(("discriminator.", *HEAD)):
            assert not (name.endswith("weight") and np.array_equal(before, third[name])), name
        else:
            assert before.tobytes() == third[name].tobytes() == fourth[name].tobytes(), name


def test_its_metrics_are_logged_from_its_start_on(whole):
    lines = [line for line in metrics.lines(whole / metrics.FILE) if "loss" in line]
    assert [NAMES & line.keys() for line in lines] == [set(), set(), NAMES, NAMES]
    validated = [line for line in metrics.lines(whole / metrics.FILE) if "validation_loss" in line]
    assert not any("adversarial" in name for line in validated for name in line)


def test_a_run_that_is_resumed_within_the_phase_equals_an_uninterrupted_one(images, whole, tmp_path):  # noqa: F811
    """It was killed before its last save."""
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "4")
    train_autoencoder(config(), images, run, tmp_path / "model")
    for item in ("model", "ema", "optimizer"):
        found, wanted = stored(run, 4, item), stored(whole, 4, item)
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            np.testing.assert_array_equal(found[name], weight, err_msg=f"{item} {name}")


def test_the_exported_model_has_no_discriminator(whole):
    assert any(adversary.is_discriminator(name) for name in stored(whole, 4, "ema"))
    assert not any("discriminator" in name for name in load_file(whole / "model" / "vae" / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(start=0), "adversarial.weight is 0.5 and adversarial.start 0; .* set both above 0, or both to 0"),
        (dict(weight=0.0), "adversarial.weight is 0.0 and adversarial.start 2"),
        (dict(weight=-1.0), "weight is -1.0; it must be at least 0"),
        (dict(width=0), "width is 0; it must be at least 1"),
        (dict(levels=2), "adversarial.levels is 2; it must be at most 1, the levels of the decoder"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(adversarial=dataclasses.replace(PHASE, **changes))


def test_crops_of_the_phase_must_be_large_enough_for_the_discriminator():
    with pytest.raises(ValueError, match=r"^crop is 16, and its crops have a side of 16 pixels; .* at least 24"):
        config("crop=16")
    form = load_experiment("experiments/qwen_image_2/autoencoder.py:tiny", ["vae.later_phases.at_48.crop=16"]).vae
    with pytest.raises(ValueError, match=r"^later_phases\.at_48\.crop is 16"):
        dataclasses.replace(form, adversarial=PHASE)


@pytest.mark.parametrize(("levels", "parts"), [(0, ()), (1, ("up_blocks.4",)), (2, ("up_blocks.3", "up_blocks.4"))])
def test_the_head_is_the_output_and_the_last_levels(levels, parts):
    names = tree.to_dict(jax.eval_shape(lambda: TrainedVAE(VAEConfig(), width=4, key=jax.random.key(0))))
    is_trained = adversary.trained_in_phase(VAEConfig(), levels)
    expected = ("discriminator.", *(f"decoder.{part}." for part in ("norm_out", "conv_out", *parts)))
    assert {name for name in names if is_trained(name)} == {name for name in names if name.startswith(expected)}
    assert all(any(name.startswith(part) for name in names) for part in expected)
