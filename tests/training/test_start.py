"""Runs that start from an imported folder or another run, with full fine-tuning or an adapter, and their results."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

from qi2_jax.interop import components, folder, stored_weights
from qi2_jax.interop.lora import writing
from qi2_jax.runs import locating
from qi2_jax.training.checkpoints import contents, manager
from tests.training.starts import ADAPTER, OVERRIDES, TINY, losses, make_samples, train, weights_of


@pytest.fixture(scope="module")
def samples(imported, tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("data") / "samples", imported)


@pytest.fixture(scope="module")
def full(samples, imported, tmp_path_factory):
    """A full fine-tuning of the imported transformer."""
    return train(samples, tmp_path_factory.mktemp("runs") / "full", imported, 4, model=imported)


def test_full_fine_tuning_begins_with_the_imported_weights_and_learns(full, imported):
    published = weights_of(imported)
    first = {name: weight.read() for name, weight in contents.weights(full / "checkpoints" / "2", "ema").items()}
    last = weights_of(full)
    for name, leaf in published.items():
        assert np.abs(first[name] - leaf).max() < 1e-2, name  # two steps at the beginning of the warm-up
    assert max(np.abs(last[name] - leaf).max() for name, leaf in published.items()) > 1e-4
    before, after = losses(full)
    assert after < before


def test_a_run_continues_from_both_weights_of_another(samples, full, imported, tmp_path):
    still = (*OVERRIDES, "transformer.optimizer.lr=1e-12")
    second = train(samples, tmp_path / "second", full, 1, still, model=imported)
    for item in ("model", "ema"):
        begun = {name: w.read() for name, w in contents.weights(second / "checkpoints" / "1", item).items()}
        for name, leaf in weights_of(full, item).items():
            moved = 0 if item == "model" else 1
            expected = leaf + 0.5 * moved * (weights_of(full, "model")[name] - leaf)  # the EMA was updated once
            np.testing.assert_allclose(begun[name], expected, atol=1e-6, err_msg=name)
    assert losses(second)[0] == pytest.approx(losses(full)[-1], rel=1e-5)


@pytest.fixture(scope="module")
def adapted(samples, imported, tmp_path_factory):
    return train(samples, tmp_path_factory.mktemp("runs") / "adapted", imported, 6, ADAPTER, imported)


def test_adapter_trains_alone_beside_the_imported_weights(adapted, imported):
    located = locating.locate(adapted)
    assert located.lora is not None and located.lora.rank == 4
    held = manager.describe(located.checkpoint, "model")
    assert held and all("lora_" in name for name in held)
    config = components.read_config(adapted / "model" / "transformer", "transformer")
    base, _ = stored_weights.open_ours(
        adapted / "model" / "transformer", components.COMPONENTS["transformer"].expected(config)
    )
    for name, leaf in weights_of(imported).items():
        np.testing.assert_array_equal(base[name].read(dtype=np.float32), leaf, err_msg=name)
    before, after = losses(adapted)
    assert after < before


def test_the_average_of_an_adapter_ramps_up_whatever_the_decay(samples, imported, tmp_path):
    """Its B starts at zero, so after one update the EMA is nine tenths of it."""
    short = (*ADAPTER, "transformer.ema_decay=0.9999", "transformer.checkpoint.every=1")
    out = train(samples, tmp_path / "short", imported, 1, short, imported)
    raw, average = (contents.weights(out / "checkpoints" / "1", item) for item in ("model", "ema"))
    for name in (name for name in raw if "lora_B" in name):
        np.testing.assert_allclose(average[name].read(), 0.9 * raw[name].read(), rtol=1e-5, err_msg=name)
        assert np.abs(raw[name].read()).max() > 0


def test_resume_of_an_adapter_is_exact(samples, adapted, imported, tmp_path):
    out = tmp_path / "parts"
    train(samples, out, imported, 4, ADAPTER, imported)
    train(samples, out, imported, 6, ADAPTER, imported)
    for item in ("model", "ema", "optimizer"):
        ours, theirs = (contents.weights(run / "checkpoints" / "6", item) for run in (out, adapted))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            np.testing.assert_array_equal(weight.read(), theirs[name].read(), err_msg=name)
    assert losses(out)[-1] == losses(adapted)[-1]


def test_a_base_with_a_flipped_byte_is_refused_by_name(samples, adapted, imported, tmp_path):
    out = tmp_path / "spoilt"
    shutil.copytree(adapted, out)
    (weights,) = (out / "model" / "transformer").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    claimed = (out / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"created with a different config[^\n]*\n  data\.base_transformer: 'sha256:\w+' -> "
    ):
        train(samples, out, imported, 8, ADAPTER, imported)
    assert (out / "config.json").read_bytes() == claimed


def test_a_full_run_that_is_to_go_on_as_an_adapter_is_refused_by_the_difference(samples, full, imported):
    with pytest.raises(ValueError, match=r"created with a different config.*\n  lora\.rank: 0 -> 4"):
        train(samples, full, imported, 8, ADAPTER, imported)


def test_diffusers_loads_the_trained_adapter(adapted, published, tmp_path):
    """PyTorch fuses the adapter into the transformer; the result equals the merged weights that we export."""
    from qi2_torch.load import load_pipeline

    config, found = locating.locate(adapted).adapter()
    writing.export_lora(found, config, tmp_path / "adapter")
    folder.export_folder(
        locating.locate(adapted).model,
        tmp_path / "merged",
        replace={"transformer": locating.locate(adapted).weights("transformer")},
    )
    pipeline = load_pipeline(published, torch.float32)
    pipeline.load_lora_weights(str(tmp_path / "adapter"))
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    merged = safetensors.numpy.load_file(next((tmp_path / "merged" / "transformer").glob("*.safetensors")))
    fused = {name: tensor.numpy() for name, tensor in pipeline.transformer.state_dict().items()}
    assert merged.keys() == fused.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(fused[name], array, atol=1e-5, err_msg=name)


def test_a_start_that_is_nowhere_leaves_no_folder(samples, imported, tmp_path):
    out = tmp_path / "run"
    given = ["--samples", str(samples.folder), "--model", str(imported), "--start", "/nope", "--out", str(out)]
    command = [sys.executable, "-m", "qi2_jax", "train", TINY, *given, *OVERRIDES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "/nope is neither a run" in done.stderr and not out.exists()


@pytest.mark.parametrize(
    ("overrides", "source", "message"),
    [
        (ADAPTER, "", "lora.rank is above 0: name the transformer to adapt"),
        (
            ("transformer.model.layers=3", *OVERRIDES),
            None,
            r"blocks\.attn\.q\.weight is \(2, 32, 32\), .* \(3, 32, 32\)",
        ),
        (OVERRIDES, "/nope", "/nope is neither a run"),
    ],
)
def test_starts_that_do_not_fit_are_refused(samples, imported, overrides, source, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(samples, tmp_path / "run", imported if source is None else source, 1, overrides, imported)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_is_given_its_models_late_can_sample_by_what_it_was_trained_with(samples, imported, tmp_path):
    """Also if the first try has another time shift, which is refused."""
    out = train(samples, tmp_path / "run", "", 2)
    with pytest.raises(ValueError, match="neither a run"):
        locating.locate(out)
    shift = "transformer.timesteps.shift.max_shift=0.7"
    with pytest.raises(ValueError, match=r"timesteps\.shift\.max_shift: 0.9 -> 0.7"):
        train(samples, out, "", 2, (*OVERRIDES, shift), model=imported)
    vae = out / "model" / "vae"
    vae.rename(tmp_path / "vae")
    train(samples, out, "", 2)  # which must not take a half for a whole
    with pytest.raises(ValueError, match="neither a run"):
        locating.locate(out)
    (out / "model" / "processor" / "more.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model contains files of other models, .* delete it"):
        train(samples, out, "", 2, model=imported)
    (out / "model" / "processor" / "more.json").unlink()
    train(samples, out, "", 2)  # all is there now
    scheduler = locating.locate(out).model / "scheduler" / "scheduler_config.json"
    assert json.loads(scheduler.read_text())["max_shift"] == 0.9
