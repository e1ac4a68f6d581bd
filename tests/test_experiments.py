"""What each experiment resolves to, as text: a diff of `tests/golden/` shows what a change of a config does.

After a change that is meant: `python -m tests.test_experiments` writes the texts again.
"""

import itertools
import json
import pathlib

import pytest

from data_pipeline.buckets import Resolutions
from data_pipeline.selection import Thresholds
from qi2_jax import config

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
EXPERIMENTS = {
    ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts): path
    for path in sorted((ROOT / "experiments").rglob("*.py"))
    if path.stem not in ("__init__", "base")
}


def resolved(path: pathlib.Path) -> str:
    return json.dumps(config.to_dict(config.load(str(path))), indent=1) + "\n"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_resolved_config_is_the_recorded_one(name):
    assert resolved(EXPERIMENTS[name]) == (GOLDEN / f"{name}.json").read_text(), "see the docstring of this file"


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("form", ["", ":tiny"])
def test_data_of_every_form_is_valid(name, form):
    data = config.load(f"{EXPERIMENTS[name]}{form}").data
    thresholds = Thresholds(**data.thresholds)
    resolutions = Resolutions.of_config(data)
    side = resolutions.areas[0][0]
    assert thresholds.min_side <= 2 * side and resolutions.fits(side, side)[0][1].left_out is None


def test_filters_get_stricter_from_stage_to_stage():
    stages = [config.load(str(path)).data.thresholds for name, path in EXPERIMENTS.items() if "qwen_image_2" in name]
    assert len(stages) == 6
    for before, after in itertools.pairwise(stages):
        for key, value in after.items():
            if key.startswith("min_"):
                assert value >= before[key], key
            elif key.startswith("max_") and key != "max_per_class":
                assert value <= before[key], key


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, path in EXPERIMENTS.items():
        (GOLDEN / f"{name}.json").write_text(resolved(path))
