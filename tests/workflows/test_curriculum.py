"""A curriculum of two stages in one command: killed on its way it ends where an uninterrupted one does."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest

from data_pipeline.samples.cache import MANIFEST, Cache
from data_pipeline.synthesis.lettering import fonts
from qi2_jax.config import loading, recorded
from qi2_jax.config.changes import Change
from qi2_jax.config.parsing import parse
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.training.checkpoints import contents, files
from qi2_jax.workflows import changes, curriculum
from qi2_jax.workflows.config import CurriculumExperiment, load_experiment

SECOND = "stages.s2_256p_edits.transformer"
TINY = "experiments/qwen_image_2/curriculum.py:tiny"
EXPERIMENT = """
import os, time
from data_pipeline.samples import cache
from experiments.qwen_image_2 import curriculum
from qi2_jax.runtime import signals
from qi2_jax.training.run import Run

def then_wait(function, path_of):
    # Does not go on after the path in WAIT_AT before a signal comes, so that no signal of a test is too late.
    def waiting(*arguments, **options):
        function(*arguments, **options)
        while str(path_of(*arguments)) == os.environ.get("WAIT_AT") and not signals.received():
            time.sleep(0.01)
    return waiting

Run.save = then_wait(Run.save, lambda run, *_: run._checkpoints.directory / str(int(run.state.step)))
cache.begin = then_wait(cache.begin, lambda folder, *_: folder)

def get_config(form=""):
    config = curriculum.get_config("tiny")
    config.order, names = ("pairs", "edits"), config.order  # which are not in the order of the alphabet
    stages = {new: config.stages[name] for new, name in zip(config.order, names)}
    del config.stages
    config.stages = stages
    config.compilation_cache = COMPILED
    config.corpus.update(edits=18, texts=0, workers=1)
    config.vae.train.steps = config.vae.optimizer.warmup = 2
    config.vae.optimizer.decay_steps = 0
    config.vae.checkpoint.every = 1
    for stage in config.stages.values():
        stage.data.mixture.conditions = (1, 0, 0)
        stage.transformer.train.steps = 6
        stage.transformer.model.layers = 1
        stage.transformer.checkpoint.every = 2
        stage.transformer.validation.samples = 1
        stage.transformer.samples.count = 1
    return config
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "short.py"
    # Outside of the runs: what the first compiles, the others read.
    path.write_text(EXPERIMENT.replace("COMPILED", repr(str(path.parent / "compiled"))))
    return path


def start(experiment, out, wait_at="") -> subprocess.Popen:
    with out.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "qi2_jax", "run", str(experiment), "--out", str(out)]
        environment = {**os.environ, "WAIT_AT": str(wait_at)}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finish(process, out) -> None:
    assert process.wait(timeout=600) == 0, out.with_suffix(".log").read_text(errors="replace")[-3000:]


def stop_at(path, how, experiment, out) -> int:
    """Starts the curriculum and sends it a signal when `path` appears, after which it waits. Returns its status."""
    process, end = start(experiment, out, path), time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(timeout=300)


def leaves(out) -> dict[str, np.ndarray]:
    located = locating.locate(out)
    return {
        f"{item}/{name}": weight.read()
        for item in ("model", "ema", "optimizer")
        for name, weight in contents.weights(located.checkpoint, item).items()
    }


@pytest.fixture(scope="module")
def uninterrupted(experiment, tmp_path_factory):
    out = tmp_path_factory.mktemp("curriculum") / "whole"
    finish(start(experiment, out), out)
    return out


def test_stages_follow_each_other_to_an_export(uninterrupted):
    figures = json.loads((uninterrupted / "report.json").read_text())["stages"]
    assert list(figures) == ["pairs", "edits"]
    assert (uninterrupted / "diffusers" / "model_index.json").is_file()
    first, second = (uninterrupted / "stages" / name / "transformer" for name in figures)
    assert locating.locate(uninterrupted).checkpoint == second / "checkpoints" / "6"
    assert json.loads((second / "config.json").read_text())["start"]["folder"] == str(first)
    drawings = {path.name for path in (second / "samples").iterdir()}
    drawn = [f"{name}-{step}" for name in ("64-0", "64-1", "prompts", "edits") for step in (0, 6)]
    assert drawings == {f"{name}.{kind}" for name in drawn for kind in ("png", "json")}
    told = json.loads((second / "samples" / "64-1-6.json").read_text())
    assert told["columns"] == ["condition 1", "target", "sample"] and all(row["text"] for row in told["samples"])


def test_no_stage_trains_on_what_another_validates_with(uninterrupted):
    caches = [Cache(place / "samples") for place in sorted((uninterrupted / "stages").iterdir())]
    streams = [stream for cache in caches for stream in cache.streams]
    held, trained = (
        {sample.record for stream in streams if stream.key.held == wanted for sample in stream}
        for wanted in (True, False)
    )
    assert held and trained and not held & trained


def test_resume_of_a_killed_curriculum_equals_an_uninterrupted_one(experiment, uninterrupted, tmp_path):
    """Killed while the autoencoder trains, stopped in the first stage's training, killed while the second encodes."""
    out = tmp_path / "killed"
    vae, first, second = (out / name for name in ("vae", "stages/pairs/transformer", "stages/edits"))
    assert stop_at(vae / "checkpoints" / "1", signal.SIGKILL, experiment, out) == -signal.SIGKILL
    assert files.steps(vae / "checkpoints") == [1]
    assert stop_at(first / "checkpoints" / "2", signal.SIGTERM, experiment, out) == 0
    assert max(files.steps(first / "checkpoints")) < 6
    assert stop_at(second / "samples", signal.SIGKILL, experiment, out) == -signal.SIGKILL
    assert not (second / "samples" / MANIFEST).exists()
    finish(start(experiment, out), out)
    expected, found = leaves(uninterrupted), leaves(out)
    assert expected.keys() == found.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_second_stage_begins_with_the_first_ones_weights_and_average(uninterrupted):
    """Its loss before the first step is that of the first stage's last weights on the same held samples."""
    lines = [
        [json.loads(line) for line in (uninterrupted / "stages" / name / "transformer" / "metrics.jsonl").open()]
        for name in ("pairs", "edits")
    ]
    ends = [line for line in lines[0] if line["step"] == 6 and "validation_loss" in line][-1]
    begins = next(line for line in lines[1] if "validation_loss" in line)
    for weights in ("ema", "raw"):
        name = f"validation_loss/{weights}/64-0"
        assert begins[name] == pytest.approx(ends[name], rel=0.2)
    assert begins["validation_loss/ema/64-0"] != begins["validation_loss/raw/64-0"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.s2_256p_edits.transformer.batch_sizes=(6,)", "stages.s2_256p_edits: .*batch of 6 does not split"),
        ("stages.s2_256p_edits.data.held_out=1.0", "stages.s2_256p_edits.data.held_out is 1.0"),
        ("stages.s2_256p_edits.data.held_out=0.5", "data.held_out differs: .*'s2_256p_edits': 0.5"),
        (f"{SECOND}.train.sinks=('foo',)", r"s2_256p_edits.transformer.train.sinks \['foo'\] are unknown"),
        (f"{SECOND}.profile.steps=0", "s2_256p_edits.transformer.profile.steps is 0; it must be at least 1"),
        (f"{SECOND}.profile.start=-1", "s2_256p_edits.transformer.profile.start is -1; it must be at least 0"),
        (f"{SECOND}.checkpoint.keep_best=2 {SECOND}.checkpoint.best_metric=", "keep_best is 2, but .* names no metric"),
        (f"{SECOND}.checkpoint.local_every=2", "local_every is 2, but local_folder '' is not an absolute path"),
        (f"{SECOND}.lora.rank=2 {SECOND}.lora.targets=('nope',)", r"s2_256p_edits: lora.targets \['nope'\] match no"),
        (f"{SECOND}.model.layers=3", r"stages.s2_256p_edits.transformer differs from .*: model.layers: 2 -> 3"),
        (f"{SECOND}.timesteps.shift.max_shift=0.7", "differs from .*: timesteps.shift.max_shift: .* -> 0.7"),
        (f"{SECOND}.start.folder=/nope", "is /nope, but a stage starts from the weights of the stage before it"),
        ("stages.s1_256p_t2i.transformer.lora.rank=2", "name the transformer to adapt with start.folder"),
        ("order=('s2_256p_edits','s1_256p_t2i')", "order is .*; it must name each of the stages .* once"),
        ("stages.s2_256p_edits.data.mixture.tasks=(1,1,1)", r"data.mixture.tasks \(1, 1, 1\) needs two shares"),
        ("vae.train.sinks=('foo',)", r"vae.train.sinks \['foo'\] are unknown"),
        ("vae.profile.steps=0", "vae.profile.steps is 0"),
        ("model.folder=/nope", "model.folder /nope is not a model folder"),
        ("start.folder=/nope", "/nope is neither a run"),
        ("vae.crop=40", "vae.crop is 40"),
        (
            "vae.perceptual.weight=1.0 vae.perceptual.folder=/nope",
            "vae.perceptual.folder=/nope: /nope/config.json does",
        ),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        curriculum.run(load_experiment(TINY, override.split()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("override", ["corpus.texts=0", "corpus.edits=0"])
def test_missing_fonts_are_told_before_anything_is_made(override, monkeypatch, tmp_path):
    find, nowhere = fonts._find, (tmp_path / "none",)
    monkeypatch.setattr(fonts, "_find", lambda name, script, folders, hint: find(name, script, nowhere, hint))
    with pytest.raises(ValueError, match=r"is in none of .*none; apt-get install fonts-noto-core \(`make") as caught:
        curriculum.run(load_experiment(TINY, [override]), tmp_path / "out")
    assert "--fonts" not in str(caught.value) and not (tmp_path / "out").exists()


def write_made(out, order, begun, changes=()) -> ml_collections.ConfigDict:
    """A curriculum of which some stages have a checkpoint, but for all contents; its config."""
    config = ml_collections.ConfigDict(loading.load(TINY))
    config.stages = {name: config.stages.s1_256p_t2i.copy_and_resolve_references() for name in order}
    config.order = order
    config.update_from_flattened_dict(dict(changes))
    for folder in (
        "corpus",
        "vae/checkpoints/1",
        "model",
        *(f"stages/{name}/transformer/checkpoints/1" for name in begun),
    ):
        (out / folder).mkdir(parents=True)
    (out / paths.CURRICULUM).write_text(json.dumps({"records": "made here", **loading.to_dict(config)}))
    return config


RGB = {"vae.channels": 3, "vae.mattes": 0.0, "vae.model.in_channels": 3, "vae.model.out_channels": 3}


def parsed(config) -> CurriculumExperiment:
    return parse(CurriculumExperiment, loading.to_dict(config))


@pytest.mark.parametrize(
    ("old", "begun", "new", "change"),
    [
        ("abc", "abc", "bac", {}),
        ("abc", "abc", "acb", {}),
        ("ab", "ab", "amb", {}),
        ("ab", "a", "ba", {}),
        ("abc", "ab", "abc", {"stages.a.data.max_cropped": 0.1}),
        ("abc", "abc", "abc", {"stages.b.encode.dtype": "bfloat16"}),
        ("abc", "abc", "abc", {"stages.a.transformer.lora.rank": 3}),
        ("abc", "abc", "abc", {"stages.c.transformer.timesteps.shift.max_shift": 0.7}),
        ("ab", "ab", "ab", {"vae.model.residual_blocks": 3}),
        ("ab", "a", "ab", RGB | {"corpus.edits": 3}),
        ("ab", "a", "ab", {"encoder.seed": 1}),
        ("ab", "a", "ab", {"encoder.folder": "/elsewhere"}),
        ("ab", "a", "ab", {"model.folder": "/elsewhere"}),
        ("abc", "ab", "abc", {"stages.a.transformer.train.steps": 99}),
    ],
)
def test_what_a_refused_change_says_to_delete_lets_it_go_on_from_what_is_left(old, begun, new, change, tmp_path):
    config = write_made(tmp_path, tuple(old), tuple(begun))
    for name in set(new) - set(old):
        config.stages[name] = config.stages.a.copy_and_resolve_references()
    config.order = tuple(new)
    config.update_from_flattened_dict(change)
    config = parsed(config)
    asked = {"records": "made here", **config.as_typed}

    def check() -> None:
        changes.check_accepted(config, tmp_path, asked, changes.may_change(config, tmp_path))

    with pytest.raises(ValueError, match=r"\(delete ") as caught:
        check()
    assert ("order: " in str(caught.value)) == (old != new)
    told = {
        path
        for paths in re.findall(r"\(delete (.+?)(?:, or restore .*)?\)$", str(caught.value), re.M)
        for path in paths.split(", ")
    }
    for path in told:
        assert tmp_path in pathlib.Path(path).parents
        shutil.rmtree(path, ignore_errors=True)  # some lie in others
    check()
    first = min([new.index(key.split(".")[1]) for key in change if key.startswith("stages.")], default=len(new))
    unlike = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), len(new))
    everything = any(key.startswith(("vae.", "encoder.", "model.", "corpus.")) for key in change)
    kept = [] if everything else [name for name in new[: min(first, unlike)] if name in begun]
    kept += ["a"] if "stages.a.transformer.train.steps" in change else []  # which goes on
    assert [name for name, own in changes.started_stages(config, tmp_path).items() if own] == kept
    assert (tmp_path / "vae").exists() != any(key.startswith("vae.") for key in change)


@pytest.mark.parametrize(
    "change",
    [
        {"start.folder": "/elsewhere"},
        {"stages.b.transformer.train.steps": 99},
        {"model.folder": "moved"},
        {"model.folder": "moved", "encoder.seed": 1, "vae.model.residual_blocks": 3},
    ],
)
def test_what_changes_nothing_that_is_made_goes_on_by_itself(change, imported, tmp_path):
    config = write_made(tmp_path / "out", ("a", "b"), ("a", "b"), {"model.folder": str(imported)})
    model_folder.copy_encoders(imported, tmp_path / "out" / "model")
    shutil.copytree(imported, tmp_path / "moved")
    if "model.folder" in change:
        change = change | {"model.folder": str(tmp_path / "moved")}
    config.update_from_flattened_dict(change)
    config = parsed(config)
    asked = {"records": "made here", **config.as_typed}

    def claim() -> list[Change]:
        free = changes.may_change(config, tmp_path / "out")
        changes.check_accepted(config, tmp_path / "out", asked, free)
        return recorded.claim(tmp_path / "out" / paths.CURRICULUM, asked, free, write=False)

    assert len(claim()) == len(change)
    config_of_processor = tmp_path / "moved" / "processor" / "more.json"
    config_of_processor.write_text("{}")  # no longer the same
    if "model.folder" in change:
        with pytest.raises(ValueError, match=r"model\.folder: .*/moved' \(delete "):
            claim()


def test_an_autoencoder_that_is_used_does_not_change_when_its_run_is_gone(tmp_path):
    config = write_made(tmp_path, ("a",), ("a",))
    shutil.rmtree(tmp_path / "vae")
    assert changes.may_change(parsed(config), tmp_path)("vae.crop")
    (tmp_path / "model" / "vae").mkdir()
    assert not changes.may_change(parsed(config), tmp_path)("vae.crop")


def test_a_stage_whose_beginning_is_lost_is_told(tmp_path):
    config = write_made(tmp_path, ("a", "b", "c"), ("b", "c"))
    message = r"stage a has no checkpoint, .*delete .*/b/.*, .*/c/.* restore .*/a/transf"
    with pytest.raises(ValueError, match=message):
        changes.may_change(parsed(config), tmp_path)
    config.stages.d = config.stages.c.copy_and_resolve_references()
    config.order = ("a", "b", "c", "d")  # which is not what is wrong
    with pytest.raises(ValueError, match=message):
        changes.may_change(parsed(config), tmp_path)


def test_another_config_for_a_finished_stage_is_refused(experiment, uninterrupted):
    before = (uninterrupted / paths.CURRICULUM).read_text()
    order, threshold = "order=('edits','pairs')", "stages.edits.data.thresholds.min_side=65"
    shift = (
        "stages.pairs.transformer.timesteps.shift.max_shift=0.7",
        "stages.edits.transformer.timesteps.shift.max_shift=0.7",
    )
    for accept_changes, *overrides in (
        (False, "stages.pairs.transformer.optimizer.lr=1.0"),
        (False, "corpus.edits=5"),
        (False, order),
        (False, threshold),
        (True, order),  # stages would be taken for what they are not
        (True, *shift),  # what is exported would be sampled with another one than it was trained with
        (True, "stages.edits.transformer.lora.rank=2"),
    ):
        config = load_experiment(str(experiment), overrides)
        with pytest.raises(ValueError, match=re.escape(overrides[0].partition("=")[0])) as caught:
            curriculum.run(config, uninterrupted, accept_changes=accept_changes)
        assert ("(delete " in str(caught.value)) == accept_changes
    command = [sys.executable, "-m", "qi2_jax", "run", str(experiment), "--out", str(uninterrupted), "--accept-changes"]
    done = subprocess.run([*command, threshold], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1 and threshold.partition("=")[0] in done.stderr and "Traceback" not in done.stderr
    assert (uninterrupted / paths.CURRICULUM).read_text() == before
