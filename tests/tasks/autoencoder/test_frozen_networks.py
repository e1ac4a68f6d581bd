"""A run of two phases with frozen networks in its loss.

It is resumed bit for bit, bound to the weights, and exported without them.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qi2_jax.interop import frozen
from qi2_jax.models import tree
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from qi2_jax.models.vae import VAE
from qi2_jax.tasks.autoencoder.config import AlignmentConfig, PerceptualConfig
from qi2_jax.tasks.autoencoder.task import train_autoencoder
from qi2_jax.training import loop
from qi2_jax.training.checkpoints import contents
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment
from tests.tasks.autoencoder.test_task import images  # noqa: F401

TERMS = ("reconstruction", "lpips", *(f"alignment/{name}" for name in ("cosine", "distance", "similarity", "weight")))
MARGINS = ("alignment/cosine_margin", "alignment/distance_margin", "alignment/scheduled_weight")
BATCH = tuple(f"batch/{name}" for name in ("phase", "height", "width", "photographs", "synthetic"))


def write_lpips(folder, seed=0):
    config = LPIPSConfig((2, 2, 3, 3, 4))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    weights = tree.to_dict(LPIPS(config, key=jax.random.key(seed)))
    save_file({name: np.asarray(weight) for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_lpips(tmp_path_factory.mktemp("weights") / "lpips")


def config(weights, *overrides):
    model = (
        "encoder_width=4",
        "decoder_width=4",
        "latent_channels=8",
        "multipliers=(1,1)",
        "halves_time=(True,)",
    )
    term = f"weight=0.5,folder={weights}".split(",")
    align = (*term, "network=vgg16", "layer=4", "strict_steps=1", "relaxing_steps=2", "relaxed_weight=0.1")
    run = ("batch_size=2", "statistics_batches=1", "train.steps=4", "train.log_every=1", "train.sinks=()")
    changes = [*(f"model.{one}" for one in model), *(f"perceptual.{one}" for one in term)]
    later = ("later_phases.at_48.start=3", "later_phases.at_48.batch_size=4", "perceptual.start=1")
    changes += [*(f"alignment.{one}" for one in align), *run, *later, *overrides]
    return load_experiment("experiments/qwen_image_2/autoencoder.py:tiny", [f"vae.{one}" for one in changes]).vae


@pytest.fixture(scope="module")
def whole(images, weights, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("whole")
    train_autoencoder(config(weights), images, out, out / "model")
    return out


def logged(out):
    return [line for line in metrics.lines(out / metrics.FILE) if "loss" in line]


def test_all_terms_margins_and_phases_are_logged(whole):
    lines = logged(whole)
    assert ["lpips" in line for line in lines] == [False, True, True, True]
    assert all({*TERMS, *MARGINS} - {"lpips"} <= line.keys() for line in lines)
    assert lines[0]["reconstruction"] < 0.8 * lines[1]["reconstruction"]  # without LPIPS, which has a weight of 0.5
    assert [line[MARGINS[0]] for line in lines] == [0, 0, 0.25, 0.5]
    assert [line[MARGINS[1]] for line in lines] == [0, 0, 0.125, 0.25]
    assert [line[MARGINS[2]] for line in lines] == pytest.approx([0.5, 0.5, 0.3, 0.1])
    assert [[line[name] for name in BATCH[:3]] for line in lines] == [[1, 32, 32]] * 3 + [[2, 48, 48]]
    assert [line[BATCH[3]] + line[BATCH[4]] for line in lines] == [1] * 4 and lines[3][BATCH[4]] == 0.5
    validated = [line for line in metrics.lines(whole / metrics.FILE) if "validation_loss" in line]
    names = {"validation_lpips", "validation_alignment/similarity/raw"}
    names |= {f"validation_psnr/{kind}{suffix}" for kind in ("photographs", "synthetic") for suffix in ("", "/raw")}
    assert all(names <= line.keys() for line in validated)


def test_a_resumed_run_equals_an_uninterrupted_one(images, weights, whole, tmp_path):  # noqa: F811
    """The weights may have moved in the meantime."""
    moved = shutil.copytree(weights, tmp_path / "moved")
    for steps, folder in ((2, weights), (4, moved)):
        train_autoencoder(config(folder, f"train.steps={steps}"), images, tmp_path / "run", tmp_path / "model")
    for item in ("model", "ema", "optimizer"):
        found, wanted = (contents.weights(out / "checkpoints" / "4", item) for out in (tmp_path / "run", whole))
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            np.testing.assert_array_equal(found[name].read(), weight.read(), err_msg=f"{item} {name}")
    for line, other in zip(logged(tmp_path / "run"), logged(whole), strict=True):
        names = (*TERMS, *MARGINS, *BATCH)
        assert [line.get(name) for name in names] == [other.get(name) for name in names]


def test_a_run_whose_record_lacks_later_keys_is_the_same_run(weights, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    record = json.loads((out / "config.json").read_text())
    del record["kl"], record["validation"]["images"]  # which have their defaults
    (out / "config.json").write_text(json.dumps(record))
    assert loop.is_finished(config(weights), record["data"], out)
    del record["alignment"]["relaxed_weight"]
    (out / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"alignment\.relaxed_weight: absent -> 0\.1"):
        loop.is_finished(config(weights), record["data"], out)


def test_the_exported_model_has_no_projection(whole, weights):
    exported = load_file(whole / "model" / "vae" / "model.safetensors")
    like = jax.eval_shape(lambda: VAE(config(weights).model, key=jax.random.key(0)))
    assert {name for name in exported if not name.startswith("passthrough")} >= tree.to_dict(like).keys()
    assert not any("projection" in name for name in exported)
    assert "projection.weight" in contents.weights(whole / "checkpoints" / "4", "ema")


def test_a_run_resumes_only_with_the_same_weights(images, weights, whole, tmp_path):  # noqa: F811
    recorded = json.loads((whole / "config.json").read_text())["data"]["frozen"]
    assert recorded == {"perceptual": frozen.digest(weights), "alignment": frozen.digest(weights)}
    other = write_lpips(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"data\.frozen\.perceptual: '"):
        train_autoencoder(config(other, "train.steps=5", "optimizer.decay_steps=0"), images, whole, tmp_path / "model")


def test_a_run_without_them_records_and_stores_what_it_did_before(images, tmp_path):  # noqa: F811
    plain = config("", "perceptual.weight=0.0", "perceptual.start=0", "alignment.weight=0.0", "train.steps=1")
    train_autoencoder(plain, images, tmp_path, tmp_path / "model")
    assert json.loads((tmp_path / "config.json").read_text())["data"].keys() == {"pictures"}
    like = jax.eval_shape(lambda: VAE(plain.model, key=jax.random.key(0)))
    assert contents.weights(tmp_path / "checkpoints" / "1", "model").keys() == tree.to_dict(like).keys()
    assert logged(tmp_path)[0].keys() & {*TERMS, *MARGINS} == set()


def test_a_weight_without_a_folder_names_the_way_out():
    for group, make in (("perceptual", PerceptualConfig), ("alignment", AlignmentConfig)):
        with pytest.raises(ValueError, match=rf"{group}\.weight is 0\.5, but {group}\.folder is empty; .*weight=0"):
            make(0.5)


@pytest.mark.parametrize(("group", "network"), [("perceptual", "vgg16"), ("alignment", "dinov2")])
def test_missing_weights_are_named_with_the_way_out(images, weights, tmp_path, group, network):  # noqa: F811
    away = tmp_path / "away"
    changed = config(weights, f"{group}.folder={away}", f"alignment.network={network}")
    with pytest.raises(ValueError, match=rf"{group}\.folder={away}: .*perceptual_weights\.md.*{group}\.weight=0"):
        train_autoencoder(changed, images, tmp_path / "run", tmp_path / "model")


def test_a_layer_that_the_network_does_not_have_is_refused(images, weights, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"alignment\.layer is 9; this network has the layers 1 to 5"):
        train_autoencoder(config(weights, "alignment.layer=9"), images, tmp_path, tmp_path / "model")
