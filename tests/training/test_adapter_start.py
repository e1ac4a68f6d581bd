"""Runs that begin with an adapter's file, and adapters trained on top of adapters."""

import shlex
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qi2_jax.cli import main
from qi2_jax.interop.lora import merging, reading
from qi2_jax.runs import locating, paths
from qi2_jax.runtime import devices
from qi2_jax.training.checkpoints import contents
from tests.interop.lora import adapters
from tests.training.starts import ADAPTER, OVERRIDES, TINY, make_samples, train, weights_of

STILL = "transformer.optimizer.lr=1e-12"
EVERYTHING = "transformer.lora.targets=('*',)"


@pytest.fixture(scope="module")
def samples(imported, tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("data") / "samples", imported)


@pytest.fixture(scope="module")
def theirs(published):
    from qi2_torch.load import load_pipeline

    return load_pipeline(published, torch.float32)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An adapter of kohya's with several ranks and alphas, at most rank 4, of some blocks."""
    spelling = dict(name="lora_unet_{}.lora_{}.weight", down="down", up="up", alpha="lora_unet_{}.alpha", flat=True)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_file(adapters.spelt(adapters.random_factors(), **spelling), path)
    return path


@pytest.fixture(scope="module")
def fused(theirs, file):
    """{published name: array} of the published transformer with this adapter, merged by diffusers."""
    with adapters.loaded(theirs, (file, 1.0)):
        return adapters.fused_weights(theirs)


def begun(run, item="model"):
    """{our name: array} after one update that changes nothing."""
    return weights_of(run / "checkpoints" / "1", item)


def test_an_adapter_is_continued(samples, imported, file, fused, tmp_path):
    """A larger rank and more layers leave its change as it is; what the file does not give begins as when fresh."""
    config = (*ADAPTER, STILL, EVERYTHING, "transformer.lora.rank=6", "transformer.lora.alpha=6.0")
    out = train(samples, tmp_path / "run", file, 1, config, imported)
    for item in ("model", "ema"):
        adapters.assert_same_weights(begun(out, item), fused)
    found = {name: weight.read() for name, weight in contents.weights(out / "checkpoints" / "1", "model").items()}
    a, b = (found[f"blocks.attn.q.lora_{factor}.weight"] for factor in "AB")
    tensors = load_file(file)
    key = "lora_unet_transformer_blocks_1_attn_to_q.lora_{}.weight"  # alpha and rank 4: the scale of the run
    np.testing.assert_allclose(a[1, :4], tensors[key.format("down")].numpy(), atol=1e-9)
    np.testing.assert_allclose(b[1, :, :4], tensors[key.format("up")].numpy(), atol=1e-9)
    assert np.abs(a[1, 4:]).min() > 0 and np.abs(b[1, :, 4:]).max() < 1e-9
    assert np.abs(a[0, 2:]).min() > 0 and np.abs(found["blocks.mlp.gate.lora_A.weight"]).min() > 0


def test_an_exported_adapter_is_continued_as_it_is(samples, imported, chain, tmp_path):
    """The factors of the first run's adapter are those with which the second run begins."""
    first = chain[0]
    main.main(["export", str(first), "--lora", "--out", str(tmp_path / "alone")])
    second = train(samples, tmp_path / "second", tmp_path / "alone", 1, (*ADAPTER, STILL), imported)
    _, want = locating.locate(first).adapter("ema")
    _, found = locating.locate(second).adapter("model")
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-9, err_msg=name)
    assert not (second / paths.START_LORA).exists()
    main.main(["export", str(second), "--lora", "--out", str(tmp_path / "again")])
    assert load_file(tmp_path / "again" / reading.FILE).keys() == load_file(tmp_path / "alone" / reading.FILE).keys()


def test_an_adapter_that_does_not_fit_says_what_would(samples, imported, file, tmp_path):
    config = (*ADAPTER, "transformer.lora.rank=3", "transformer.lora.targets=('blocks.attn.*',)")
    with pytest.raises(ValueError, match=r"cannot be continued: it has the rank 4, transformer\.lora\.rank") as error:
        train(samples, tmp_path / "run", file, 1, config, imported)
    assert "it changes ['blocks.mlp.down', 'blocks.mlp.up', " in str(error.value)
    assert "which transformer.lora.targets ('blocks.attn.*',) leave out" in str(error.value)
    assert "transformer.lora.rank=0" in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
    way_out = shlex.split(str(error.value).split("Give ")[1].split(", or ")[0])
    train(samples, tmp_path / "run", file, 1, (*ADAPTER, *way_out), imported)


def test_the_command_begins_with_an_adapter_of_the_model(samples, imported, file, fused, tmp_path, monkeypatch):
    """Without its transformer it is refused, before anything is made."""
    monkeypatch.setattr(devices, "set_platform", lambda *arguments: None)  # JAX has begun
    monkeypatch.setattr(devices, "set_compilation_cache", lambda *arguments: None)
    out = tmp_path / "run"
    command = ["train", TINY, "--samples", str(samples.folder), "--start", str(file), "--out", str(out)]
    options = [*OVERRIDES, STILL, "transformer.train.steps=1"]
    with pytest.raises(SystemExit, match=r"is an adapter: name the run or model folder .* with --model"):
        main.main([*command, *options])
    assert not out.exists()
    main.main([*command, "--model", str(imported), *options])
    assert locating.locate(out).lora is None
    adapters.assert_same_weights(begun(out), fused)
    main.main([*command, *options])  # a run that has begun needs neither again


def test_an_adapter_is_no_model(file):
    with pytest.raises(ValueError, match="is an adapter, not a model; name the model here"):
        locating.locate(file)


@pytest.fixture(scope="module")
def chain(samples, imported, tmp_path_factory):
    """Three LoRA runs, each of which adapts the merged weights of the one before."""
    folder = tmp_path_factory.mktemp("chain")
    first = train(samples, folder / "first", imported, 2, ADAPTER, imported)
    narrow = (*ADAPTER, "transformer.lora.rank=2", "transformer.lora.targets=('blocks.attn.*', 'modulation')")
    second = train(samples, folder / "second", first, 2, narrow, imported)
    third = train(samples, folder / "third", second, 2, ADAPTER, imported)
    return first, second, third


@pytest.mark.parametrize("index", [1, 2])
def test_adapters_on_adapters_are_exported_as_one(chain, published, theirs, index, tmp_path):
    """It fits the published model; the adapter of the last run alone does not."""
    run = chain[index]
    main.main(["export", str(run), "--lora", "--out", str(tmp_path / "alone")])
    with adapters.loaded(theirs, (tmp_path / "alone", 1.0)):
        adapters.assert_same_weights(weights_of(run), adapters.fused_weights(theirs))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "alone" / reading.FILE).items()}
    rank = 4 + 2 + (4 if index == 2 else 0)
    assert shapes["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] == (rank, 32)
    assert shapes["transformer.modulation.1.lora_A.weight"] == (2, 32)
    config, own = locating.locate(run).adapter("ema")
    alone = merging.merged(locating.locate(chain[0]).weights("transformer"), merging.changes_of(own, config))
    name = "blocks.attn.q.weight"
    assert index == 1 or np.abs(alone[name].read() - weights_of(run)[name]).max() > 1e-5


def test_a_run_of_an_earlier_version_does_not_export_half_of_its_change(samples, chain, imported, tmp_path):
    """It kept no adapter of its start; the whole model can be exported, and other runs can begin with it."""
    old = tmp_path / "old"
    shutil.copytree(chain[1], old)
    shutil.rmtree(old / paths.START_LORA)
    with pytest.raises(SystemExit, match=r"did not keep: the adapter of this run alone does not fit .* without --lora"):
        main.main(["export", str(old), "--lora", "--out", str(tmp_path / "alone")])
    main.main(["export", str(old), "--out", str(tmp_path / "whole")])
    later = train(samples, tmp_path / "later", old, 1, (*ADAPTER, STILL), imported)
    with pytest.raises(SystemExit, match="did not keep"):
        main.main(["export", str(later), "--lora", "--out", str(tmp_path / "later_alone")])


def test_another_start_replaces_the_adapter_of_the_first(samples, chain, imported, tmp_path):
    """A run that is restarted may start from other weights."""
    out = tmp_path / "run"
    train(samples, out, chain[0], 1, (*ADAPTER, STILL), imported)
    assert (out / paths.START_LORA).is_dir()
    shutil.rmtree(out / "checkpoints")
    train(samples, out, imported, 1, (*ADAPTER, STILL), imported, restart=True)
    assert not (out / paths.START_LORA).exists()


def test_the_command_line_takes_adapters(imported, file, tmp_path, capsys):
    options = ["--size", "64x64", "--steps", "2", "--dtype", "float32"]
    for name, lora in (
        ("without", []),
        ("with", ["--lora", str(file), "--lora", f"{file}:-0.5"]),
        ("none", [f"--lora={file}:0"]),
    ):
        out = tmp_path / f"{name}.png"
        main.main(["sample", str(imported), "--prompt", "a fox", "--out", str(out), *options, *lora])
    images = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("without", "with", "none")}
    assert images["without"] == images["none"] != images["with"]
    with pytest.raises(SystemExit):
        main.main(["sample", str(imported), "--prompt", "a fox", "--out", str(out), "--lora", f"{file}:much"])
    assert "is neither a file nor FILE:SCALE with a finite number" in capsys.readouterr().err
