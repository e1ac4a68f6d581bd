"""What each experiment resolves to, as text: a diff of `tests/golden/` shows what a change of a config does.

After a change that is meant: `python -m tests.test_experiments` writes the texts again.
"""

import itertools
import json
import pathlib
import re

import pytest

from qi2_jax.config import loading
from qi2_jax.tasks.transformer import fixed_prompts
from qi2_jax.tasks.transformer.config import check_transformer
from qi2_jax.workflows.config import load_experiment

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
EXPERIMENTS = {
    ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts): path
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if path.stem not in ("__init__", "base", "chips", "defaults")
}


FORMS = ("", "tiny")
STAGES = [name for name in EXPERIMENTS if re.search(r"\.s\d_", name)]


def resolved(name: str, form: str) -> str:
    return json.dumps(loading.to_dict(loading.load(f"{EXPERIMENTS[name]}{form and ':'}{form}")), indent=1) + "\n"


def golden(name: str, form: str) -> pathlib.Path:
    return GOLDEN / f"{name}{form and '.'}{form}.json"


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("form", FORMS)
def test_resolved_config_is_the_recorded_one(name, form):
    assert resolved(name, form) == golden(name, form).read_text(), "see the docstring of this file"


@pytest.mark.parametrize("name", [*STAGES, "demo"])
@pytest.mark.parametrize("form", ["", ":tiny"])
def test_data_of_every_form_is_valid(name, form):
    data = load_experiment(f"{EXPERIMENTS[name]}{form}").data
    assert data.thresholds.min_side <= max(2 * data.sides[0], data.sides[-1])
    smallest = data.sides[0]
    assert data.resolutions.fits(smallest, smallest)[0][1].left_out is None


def test_resolution_filters_are_the_reports():
    """Resolution(256) in stage 1, (1024) in stage 4, (2048) in stage 5; every stage keeps the filters before it."""
    sides = [loading.load(str(EXPERIMENTS[name])).data.thresholds.min_side for name in STAGES]
    assert sides == [256, 256, 256, 1024, 2048, 2048]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("form", ["", ":tiny"])
def test_a_stage_draws_fixed_edits_where_it_trains_on_edits(name, form):
    stage = load_experiment(f"{EXPERIMENTS[name]}{form}")
    edits = stage.transformer.samples.edits
    assert bool(edits) == (stage.data.mixture.tasks[1] > 0)
    fixed_prompts.check_images(stage.transformer.samples, max(stage.data.sides))
    assert not form or len({len(edit) for edit in edits}) <= 1, "another number of images is another program"


def test_no_random_stream_of_a_stage_is_that_of_another():
    """Streams and validation take seeds that follow the stage's: two for every stream, one for validation."""
    seeds = [loading.load(str(EXPERIMENTS[name])).transformer.seed for name in STAGES]
    assert all(after - before >= 100 for before, after in itertools.pairwise(seeds))


def test_filters_get_stricter_from_stage_to_stage():
    ladder = [loading.load(str(EXPERIMENTS[name])).data.thresholds for name in STAGES]
    assert len(ladder) == 6
    for before, after in itertools.pairwise(ladder):
        for key, value in after.items():
            if key.startswith("min_"):
                assert value >= before[key], key
            elif key.startswith("max_") and key != "max_per_class":
                assert value <= before[key], key


@pytest.mark.parametrize("form", ["", ":tiny"])
def test_curriculum_holds_the_stages_as_they_are(form):
    whole = loading.load(f"{EXPERIMENTS['qwen_image_2.curriculum']}{form}")
    assert [f"qwen_image_2.{name}" for name in whole.order] == STAGES
    for name in STAGES:
        own = loading.load(f"{EXPERIMENTS[name]}{form}")
        assert loading.to_dict(whole.stages[name.rpartition(".")[2]]) == loading.to_dict(own)


def test_stages_have_the_steps_batches_and_rates_of_the_report():
    """Its table 2: pre-training, continual pre-training, fine-tuning."""
    phases = {"pre": (1, 2, 3), "continual": (4, 5), "fine": (6,)}
    steps, rates = (
        {"pre": 700_000, "continual": 250_000, "fine": 10_000},
        {"pre": 1e-4, "continual": 2e-5, "fine": 1e-5},
    )
    batches = {256: 32_768, 512: 16_384, 1024: 8_192, 2048: 4_096}
    for phase, numbers in phases.items():
        own = [loading.load(str(EXPERIMENTS[STAGES[number - 1]])) for number in numbers]
        assert sum(stage.transformer.train.steps for stage in own) == steps[phase]
        for stage in own:
            transformer = stage.transformer
            assert transformer.optimizer.lr == rates[phase] and transformer.optimizer.weight_decay == 0.001
            assert transformer.optimizer.clip == 1.0 and transformer.dropout == 0.1
            assert transformer.batch_sizes == tuple(batches[side] for side in stage.data.sides)
            pairs, edits = stage.data.mixture.tasks
            if edits:
                assert pairs / (pairs + edits) == (0.9 if phase == "pre" else 0.7)


@pytest.mark.parametrize("name", STAGES)
def test_tiny_stages_can_train_here(name):
    check_transformer(load_experiment(f"{EXPERIMENTS[name]}:tiny"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["demo", "qwen_image_2.autoencoder", "qwen_image_2.curriculum"])
def test_crops_fit_the_narrowest_bucket(name, form):
    config = load_experiment(f"{EXPERIMENTS[name]}{form and ':'}{form}")
    data = config.data if hasattr(config, "data") else config.stages[config.order[0]].data
    sides = [
        side for _, buckets in data.resolutions.areas for size in buckets.sizes for side in (size.width, size.height)
    ]
    assert config.vae.crop <= min(sides)


@pytest.mark.parametrize("form", FORMS)
def test_the_curriculum_trains_the_autoencoder_as_it_is_trained_alone(form):
    """But for the crops, which the smaller images of stage 1 must have room for, and the phases after them."""
    curriculum, alone = (
        loading.to_dict(loading.load(f"{EXPERIMENTS[f'qwen_image_2.{name}']}{form and ':'}{form}").vae)
        for name in ("curriculum", "autoencoder")
    )
    phases = {"kinds", "unmirrored_kinds", "shares", "ratios", "later_phases"}
    assert {**curriculum, "crop": alone["crop"]} == {key: alone[key] for key in alone.keys() - phases}
    assert all((alone[term]["weight"] > 0) == (form == "") for term in ("perceptual", "alignment"))


@pytest.mark.parametrize("form", FORMS)
def test_the_autoencoder_holds_out_as_many_images_as_the_stages(form):
    stages = load_experiment(f"{EXPERIMENTS['qwen_image_2.curriculum']}{form and ':'}{form}").stages.values()
    alone = load_experiment(f"{EXPERIMENTS['qwen_image_2.autoencoder']}{form and ':'}{form}")
    assert {stage.data.held_out for stage in stages} == {alone.data.held_out}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, form in itertools.product(EXPERIMENTS, FORMS):
        golden(name, form).write_text(resolved(name, form))
