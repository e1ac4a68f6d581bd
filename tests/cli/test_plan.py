"""`qi2 plan`: a stage compiled for chips that are not attached."""

import dataclasses
import json

import pytest

from qi2_jax.cli import main
from qi2_jax.workflows.config import load_experiment
from tests.tpu import needs_libtpu

STAGE = "experiments/qwen_image_2/s1_256p_t2i.py:tiny"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The verb sets these unless they are set, and later tests would inherit that."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")


def plan(*arguments):
    main.main(["plan", *arguments])


@needs_libtpu
def test_a_search_writes_an_experiment_and_its_plan(tmp_path, capsys):
    found, path = tmp_path / "found.py", tmp_path / "plan.json"
    to = ["--topology", "v5e:2x2", "--price", "1.2", "--search", str(found), "--tries", "1", "--json", str(path)]
    plan(STAGE, *to, "transformer.train.steps=50")
    shown = capsys.readouterr().out
    for text in ("MFU of tokens, at most", "overlapped with arithmetic", "USD", f"wrote {path}", f"wrote {found}"):
        assert text in shown

    report = json.loads(path.read_text())
    program = report["programs"][0]
    assert program["bound_seconds"] > 0 and 0 < program["overlapped"] <= 1
    assert program["compiled_ratio"] > 1  # the backward pass of attention computes the scores again
    assert report["bound"]["days"] == pytest.approx(50 * report["bound"]["update_seconds"] / 86_400)
    assert report["bound"]["mfu"] < program["slots_bound"]  # most of the longest caption is padding here

    transformer = load_experiment(str(found)).transformer
    assert transformer.train.steps == 50
    assert dataclasses.asdict(transformer.mesh) == report["mesh"]
    assert transformer.execution.keep == "fit" and transformer.execution.activations_gib > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:2x2", "--utilisation", "1.5"], "--utilisation is 1.5; it must be above 0 and at most 1"),
        (["--topology", "v5e:2x2", "--captions", "long"], "'long' are not MEDIAN:SIGMA:MOST, such as 120:0.8:1024"),
        (["--topology", "v5e:2x2", "--slices", "0"], "--slices is 0; it must be at least 1"),
        (["--topology", "v5e:2x2", "--search", "found.json"], "its name must end in .py"),
        (["--topology", "v5e:2x2", "transformer.mesh.fsdp=3"], "has 4 chips, which fsdp=3 x tensor=2 does not divide"),
        (["--topology", "v5e:3x5"], "topology 'v5e:3x5' is unknown"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(SystemExit, match="qi2 plan") as raised:
        plan(STAGE, *arguments)
    assert message in str(raised.value)


@needs_libtpu
def test_the_sampler_is_compiled_on_request(capsys):
    small = ["transformer.model.layers=1", "transformer.execution.remat=True"]
    plan(STAGE, "--topology", "v5e:2x2", "--sampler", *small)
    shown = capsys.readouterr().out
    assert "sampler:" in shown and "prefix" in shown


def test_a_curriculum_is_no_stage():
    with pytest.raises(SystemExit, match="is several trainings; take its stages one after the other"):
        plan("experiments/qwen_image_2/curriculum.py:tiny", "--topology", "v5e:2x2")
