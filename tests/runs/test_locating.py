"""Locating the model in a path given by the user, and its weights."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qi2_jax.interop import components, files, folder, mmdit
from qi2_jax.models import tree
from qi2_jax.runs import locating, paths
from qi2_jax.training.checkpoints import contents
from qi2_jax.training.checkpoints.files import steps
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.step import TrainState
from tests.interop import safetensors_bytes

COMPONENT = components.COMPONENTS["transformer"]


def random_state(config, step: int) -> TrainState:
    rng = np.random.default_rng(step)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    model, ema = (jax.tree.map(draw, COMPONENT.abstract(config)) for _ in range(2))
    return TrainState(jnp.int32(step), model, optax.adam(0.1).init(model), ema, jnp.int32(0), jnp.int32(0))


@pytest.fixture(scope="module")
def run(imported, tmp_path_factory):
    """(folder, states by step) of a run with two checkpoints; its model folder has no weights of the transformer."""
    path = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(imported, path / paths.MODEL, copy_function=os.link)
    (path / paths.MODEL / "transformer" / "model.safetensors").unlink()
    config = components.read_config(path / paths.MODEL / "transformer", "transformer")
    states = {step: random_state(config, step) for step in (3, 12)}
    checkpoints = Checkpoints(path / paths.CHECKPOINTS)
    for state in states.values():
        checkpoints.save(state)
    checkpoints.close()
    return path, states


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run to damage."""
    shutil.copytree(run[0], tmp_path / "run", copy_function=os.link)
    return tmp_path / "run"


def test_a_run_means_its_newest_checkpoint(run):
    path, _ = run
    assert locating.locate(path) == locating.Located(path / "model", path / "checkpoints" / "12")
    assert locating.locate(str(path)) == locating.locate(path)


def test_a_checkpoint_means_itself(run, monkeypatch):
    path, _ = run
    want = locating.Located(path / "model", path / "checkpoints" / "3")
    assert locating.locate(path / "checkpoints" / "3") == want
    monkeypatch.chdir(path / "checkpoints")
    assert locating.locate("3") == want
    monkeypatch.chdir(path / "checkpoints" / "3")
    assert locating.locate(".") == want


def test_an_imported_folder_means_itself(imported, run):
    assert locating.locate(imported) == locating.Located(imported)
    assert locating.locate(run[0] / "model") == locating.Located(run[0] / "model")


def test_a_job_means_its_run(run, tmp_path):
    (tmp_path / paths.JOB).write_text("{}")
    with pytest.raises(ValueError, match="transformer is neither a run"):
        locating.locate(tmp_path)
    (tmp_path / paths.TRANSFORMER).symlink_to(run[0])
    assert locating.locate(tmp_path) == locating.locate(tmp_path / paths.TRANSFORMER)


@pytest.mark.parametrize(
    ("record", "order"),
    [
        ({"order": ["b", "a"], "stages": {"a": {}, "b": {}}}, ["b", "a"]),
        ({"stages": {"b": {}, "a": {}}}, ["a", "b"]),  # of an earlier version
    ],
)
def test_a_curriculum_means_the_run_of_its_latest_stage(record, order, run, tmp_path):
    (tmp_path / paths.CURRICULUM).write_text(json.dumps(record))
    assert paths.order_of(tmp_path) == order
    for name in order:
        (tmp_path / paths.STAGES / name).mkdir(parents=True)
        (tmp_path / paths.STAGES / name / paths.TRANSFORMER).symlink_to(run[0])
        assert locating.locate(tmp_path).checkpoint == tmp_path / "stages" / name / "transformer" / "checkpoints" / "12"
    (tmp_path / paths.CURRICULUM).write_text(json.dumps({"order": "a", "stages": {"a": {}}}))
    with pytest.raises(ValueError, match=r"curriculum\.json is damaged: its order is 'a'"):
        locating.locate(tmp_path)


def test_one_set_of_weights_leaves_no_choice(imported, run):
    with pytest.raises(ValueError, match="has a single set of weights"):
        locating.locate(imported, "model")
    assert locating.locate(run[0], "model") == locating.locate(run[0])


@pytest.mark.parametrize("item", ["ema", "model"])
def test_weights_of_a_checkpoint(run, item):
    path, states = run
    weights = locating.locate(path).weights("transformer", item)
    want = tree.to_dict(getattr(states[12], item))
    assert weights.keys() == want.keys()
    for name, leaf in want.items():
        assert (weights[name].code, weights[name].shape) == ("F32", leaf.shape)
        np.testing.assert_array_equal(weights[name].read(), leaf)
    name = "blocks.mlp.up.weight"
    np.testing.assert_array_equal(weights[name].read((slice(0, 1), slice(2, 9))), want[name][0:1, 2:9])
    np.testing.assert_array_equal(weights[name].part(1), want[name][1])
    assert weights[name].read(dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_leaves_of_the_optimizer_are_read_like_weights(run):
    path, states = run
    found = contents.weights(path / "checkpoints" / "12", "optimizer")
    for name, leaf in tree.to_dict(states[12].optimizer).items():
        np.testing.assert_array_equal(found[name].read(), leaf)


def test_weights_of_an_imported_folder(imported):
    located = locating.locate(imported)
    for name in components.COMPONENTS:
        stored = safetensors_bytes.read(imported / name / "model.safetensors")
        weights = located.weights(name)
        assert weights.keys() == {key for key in stored if not key.startswith("carried.")}
        for key, weight in weights.items():
            assert weight.read().tobytes() == stored[key][2]


def test_round_trip_of_a_checkpoint(run, tmp_path):
    path, states = run
    located = locating.locate(path / "checkpoints" / "3")
    folder.export_folder(located.model, tmp_path / "out", replace={"transformer": located.weights("transformer")})
    want = {}
    for ours, leaf in tree.to_dict(states[3].ema).items():
        names = mmdit.NAMES.to_published(ours, leaf.shape)
        for name, layer in zip(names, leaf if mmdit.NAMES.is_stacked(names[0]) else [leaf], strict=True):
            want[name] = ("F32", layer.shape, np.asarray(layer).tobytes())
    assert safetensors_bytes.read_folder(tmp_path / "out" / "transformer") == want
    # The export can be imported like any published pipeline.
    folder.import_folder(tmp_path / "out", tmp_path / "again")
    again = locating.locate(tmp_path / "again").weights("transformer")
    for name, leaf in tree.to_dict(states[3].ema).items():
        np.testing.assert_array_equal(again[name].read(), leaf)


def test_paths_that_mean_nothing(run, tmp_path):
    path, _ = run
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    nothing = [tmp_path, tmp_path / "missing", tmp_path / "checkpoints" / "3", path / "checkpoints", path / "model/vae"]
    for other in nothing:
        with pytest.raises(ValueError, match=r"is neither a run .* nor a checkpoint of one, nor an imported folder"):
            locating.locate(other)


@pytest.mark.parametrize("name", ["4", "12.tmp", "latest"])
def test_checkpoints_that_do_not_exist(copied, name):
    (copied / "checkpoints" / "12.tmp").mkdir()
    with pytest.raises(ValueError, match=rf"{name} is not a complete checkpoint; .* the steps \[3, 12\]"):
        locating.locate(copied / "checkpoints" / name)


def test_a_run_that_has_saved_nothing_yet(copied):
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ValueError, match="has no complete checkpoint in"):
        locating.locate(copied)


def test_a_run_whose_model_folder_is_not_complete(copied):
    (copied / "model" / folder.MARK).rename(copied / "model" / files.UNFINISHED)
    for path in (copied, copied / "model", copied / "checkpoints" / "3"):
        with pytest.raises(ValueError, match="is neither a run"):
            locating.locate(path)


FULL_DISK = """
import pathlib, resource, sys
import jax.numpy as jnp
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.step import TrainState
model = {"weight": jnp.arange(100_000) % 7919}
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # of every file
try:
    checkpoints.save(TrainState(jnp.int32(1), model, model, model, jnp.int32(0), jnp.int32(0)))
    checkpoints.close()
except ValueError as error:
    print(error)
"""


def test_a_save_onto_a_full_disk_is_told_in_lines_and_raised(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "Failed writing" in done.stdout and f"{tmp_path}/1" in done.stdout
    assert "Traceback" not in done.stderr
    assert steps(tmp_path) == []


def test_items_that_a_checkpoint_does_not_have(run):
    with pytest.raises(ValueError, match=r"has no item 'average', only \['ema', 'model', 'optimizer', 'progress'\]"):
        locating.locate(run[0]).weights("transformer", "average")


def test_a_checkpoint_that_does_not_match_the_configuration(copied):
    config = copied / "model" / "transformer" / "config.json"
    text = (
        config.read_text()
        .replace('"num_layers": 2', '"num_layers": 3')
        .replace('"in_channels": 16', '"in_channels": 8')
    )
    config.unlink()
    config.write_text(text.replace('"out_channels": 16', '"out_channels": 8'))
    with pytest.raises(ValueError, match=r"checkpoints/12: 11 tensors do not match its configuration") as caught:
        locating.locate(copied).weights("transformer")
    assert "misshapen: blocks.attn.q.weight is (2, 32, 32), the configuration says (3, 32, 32)" in str(caught.value)
    assert "misshapen: image_in.weight is (32, 16), the configuration says (32, 8)" in str(caught.value)


def test_a_damaged_checkpoint(copied):
    for path in (copied / "checkpoints" / "12").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match="checkpoints/12"):
        locating.locate(copied).weights("transformer")


def test_weights_that_are_missing(copied):
    (copied / "model" / "vae" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vae has neither model\.safetensors nor"):
        locating.locate(copied).weights("vae")
    # The model folder of a run contains no transformer weights.
    with pytest.raises(ValueError, match=r"transformer has neither model\.safetensors nor"):
        locating.locate(copied / "model").weights("transformer")
