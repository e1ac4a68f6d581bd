"""Runs that train an adapter: what they hold, generate and export."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.torch import load_file

from qi2_jax import sharding
from qi2_jax.cli import main
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.interop import components, files, tensors
from qi2_jax.interop import mmdit as names
from qi2_jax.interop.lora import reading
from qi2_jax.models import lora, tree
from qi2_jax.runs import locating, paths
from qi2_jax.training import step
from qi2_jax.training.checkpoints.manager import Checkpoints
from tests.interop.lora.adapters import CONFIGS, random_adapter
from tests.models.test_mmdit import relative

TRANSFORMER = components.COMPONENTS["transformer"]


@pytest.fixture(scope="module")
def lora_run(imported, ours, tmp_path_factory):
    """(folder, state) of a run that trained an adapter."""
    path = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(imported, path / paths.MODEL, copy_function=os.link)
    config = CONFIGS["attention"]
    group = {"rank": config.rank, "alpha": config.alpha, "targets": list(config.targets)}
    files.write_json(path / "config.json", {"seed": 0, "lora": group})
    model, ema = (random_adapter(ours.transformer, config, seed) for seed in (8, 9))
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    state = step.init_state(lambda _: model, optax.adam(0.1), jax.random.key(0), mesh)
    state = state._replace(step=jnp.int32(5), ema=ema)
    checkpoints = Checkpoints(path / paths.CHECKPOINTS)
    checkpoints.save(state)
    checkpoints.close()
    return path, state


@pytest.mark.parametrize("item", ["ema", "model"])
def test_a_lora_run_holds_the_merged_model(lora_run, ours, item):
    path, state = lora_run
    located = locating.locate(path, item)
    assert located.lora == CONFIGS["attention"]
    assert locating.locate(path / "checkpoints" / "5") == located
    weights = located.weights("transformer", item)
    want = tree.to_dict(lora.merge(ours.transformer, getattr(state, item)))
    assert weights.keys() == want.keys()
    for name, leaf in want.items():
        assert (weights[name].code, weights[name].shape) == ("F32", leaf.shape)
        np.testing.assert_allclose(weights[name].read(), leaf, rtol=0, atol=1e-6)
    name = "blocks.attn.q.weight"
    part = weights[name].read((slice(1, 2), slice(2, 9), slice(3, 5)))
    np.testing.assert_allclose(part, want[name][1:2, 2:9, 3:5], rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights[name].part(1), want[name][1], rtol=0, atol=1e-6)
    assert weights[name].read(dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert located.weights("vae").keys() == locating.Located(path / paths.MODEL).weights("vae").keys()


def test_exports_of_a_lora_run(lora_run, ours, theirs, base_config, tmp_path, capsys):
    """Alone, and merged into a pipeline: what diffusers makes of the first is the second."""
    path, state = lora_run
    main.main(["export", str(path), "--lora", "--out", str(tmp_path / "alone")])
    assert capsys.readouterr().out == f"{tmp_path / 'alone' / reading.FILE}\n"
    main.main(
        ["export", str(path), "--lora", "--weights", "model", "--dtype", "bfloat16", "--out", str(tmp_path / "b")]
    )
    for folder, adapter in (("alone", state.ema), ("b", state.model)):
        found = load_file(tmp_path / folder / reading.FILE)
        for name, leaf in tree.to_dict(adapter).items():
            want = leaf if folder == "alone" else leaf.astype(jnp.bfloat16)
            for layer, key in enumerate(names.NAMES.to_published(name, leaf.shape)):
                np.testing.assert_array_equal(
                    found[f"transformer.{key}"].float().numpy(), want[layer].astype(jnp.float32)
                )
    main.main(["export", str(path), "--out", str(tmp_path / "merged")])
    fused = tensors.scan_folder(tmp_path / "merged" / "transformer", TRANSFORMER.stem)
    try:
        theirs.load_lora_weights(tmp_path / "alone")
        theirs.fuse_lora()
        for name, value in theirs.transformer.state_dict().items():
            if ".lora_" not in name:
                assert relative(fused[name.replace(".base_layer", "")].open(), value.numpy()) <= 1e-5, name
    finally:
        theirs.unfuse_lora()
        theirs.unload_lora_weights()


def test_a_lora_run_generates_with_its_adapter(lora_run, ours):
    path, state = lora_run
    loaded = tree.to_dict(Pipeline.load(path, dtype=jnp.float32).transformer)
    for name, leaf in tree.to_dict(lora.merge(ours.transformer, state.ema)).items():
        np.testing.assert_allclose(loaded[name], leaf, rtol=0, atol=1e-6)


def test_only_a_lora_run_has_an_adapter(imported, lora_run, tmp_path):
    with pytest.raises(SystemExit, match=r"has no adapter; only runs with lora.rank above 0 have one"):
        main.main(["export", str(imported), "--lora", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="leave one of them out"):
        main.main(["export", str(lora_run[0]), "--lora", "--verify", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"rank": 3, "alpha": 12.0}, "'targets'"),
        ({"rank": 4, "alpha": 12.0, "targets": ["blocks.attn.*"]}, "misshapen: blocks.attn.k.lora_A.weight is"),
        ({"rank": 3, "alpha": 12.0, "targets": ["blocks.mlp.*"]}, "missing: blocks.mlp.down.lora_A.weight"),
        ({"rank": 0}, "unexpected: blocks.attn.k.lora_A.weight"),
        (None, "unexpected: blocks.attn.k.lora_A.weight"),
        ([3], "list indices"),
    ],
)
def test_a_run_whose_config_does_not_fit_is_refused(lora_run, group, says, tmp_path):
    shutil.copytree(lora_run[0], tmp_path / "run", copy_function=os.link)
    (tmp_path / "run" / "config.json").unlink()
    files.write_json(tmp_path / "run" / "config.json", {"lora": group})
    with pytest.raises(ValueError, match=says):
        locating.locate(tmp_path / "run").weights("transformer")
