"""`qi2 plan`: a stage compiled for chips that are not attached."""

import dataclasses
import json

import pytest

from qi2_jax.cli import main
from qi2_jax.interop import vae
from qi2_jax.models.vae import VAEConfig
from qi2_jax.workflows.config import load_experiment
from tests.models import tiny_qwen3_vl
from tests.tpu import needs_libtpu

STAGE = "experiments/qwen_image_2/s1_256p_t2i.py:tiny"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The verb sets these unless they are set, and later tests would inherit that."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("COLUMNS", "200")  # labels in one line


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
        (["--topology", "v5e:2x2", "--model", "folder"], "--model names the encoders of --caching"),
        (["--topology", "v5e:2x2", "--caching", "--sampler"], "the plan of the caching job has no --sampler"),
        (["--topology", "v5e:2x2", "--caching"], "data=1 x fsdp=1 x tensor=1 needs 1 devices, but 4 are present"),
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


@needs_libtpu
def test_the_caching_job_is_compiled_for_a_host(tmp_path, capsys):
    model, path = tmp_path / "model", tmp_path / "plan.json"
    small = VAEConfig(4, 4, 8, multipliers=(1, 1), halves_time=(True,))
    encoder = tiny_qwen3_vl.published_config("patches_of_qwen")
    for name, values in (("vae", vae.to_diffusers(small)), ("text_encoder", encoder.to_dict())):
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text(json.dumps(values))
    edits = "experiments/qwen_image_2/s2_256p_edits.py:tiny"
    to = ["--topology", "v5e:4x4", "--caching", "--model", str(model), "--captions", "20:0.5:60", "--json", str(path)]
    plan(edits, *to, "encode.mesh.data=4", "encode.dtype=bfloat16", "data.mixture.conditions=(1,1,0)")
    shown = capsys.readouterr().out
    for text in ("a host of v5e:4x4: 4 chips", "HBM GiB: text_encoder", "images or prompts/s of a chip, at most"):
        assert text in shown

    report = json.loads(path.read_text())
    images, prompts, edits = report["programs"]
    assert images["name"] == "images, 64 x 96" and images["images"] == 8
    # 100 tokens of the longest caption, 14 of the system turn, and 32 before each image of 6 features, in steps of 64.
    assert prompts["name"] == "prompts, 128 tokens, 0 images" and edits["name"] == "prompts, 192 tokens, 2 images"
    assert all(program["memory_total"] > sum(report["weight_bytes"].values()) for program in report["programs"])
    assert all(program["chips"] == 4 and program["bound_seconds"] > 0 for program in report["programs"])


def test_a_curriculum_is_no_stage():
    with pytest.raises(SystemExit, match="is several trainings; take its stages one after the other"):
        plan("experiments/qwen_image_2/curriculum.py:tiny", "--topology", "v5e:2x2")
