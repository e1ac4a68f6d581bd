"""Experiments load, and overrides are checked."""

import json

import pytest

from qi2_jax.config import loading, recorded
from qi2_jax.runtime import devices

DEMO = "experiments/demo.py"


def test_overrides_change_values_and_keep_their_types():
    changed = loading.load(
        f"{DEMO}:tiny",
        ["transformer.optimizer.lr=1", "transformer.mesh.fsdp=4", "encoder.folder=123", "vae.optimizer.betas=(0,0.5)"],
    )
    assert (changed.transformer.optimizer.lr, changed.transformer.mesh.fsdp) == (1.0, 4)
    assert isinstance(changed.transformer.optimizer.lr, float)
    assert (changed.encoder.folder, changed.vae.optimizer.betas) == ("123", (0, 0.5))


def test_overrides_fill_tuples_that_were_empty():
    changed = loading.load(
        f"{DEMO}:tiny",
        [
            'transformer.samples.prompts=("a lighthouse above the sea", "一座灯塔")',
            "transformer.samples.edits=[['make it night', 'day.png'], ('join them', 'a.png', 'b.png')]",
        ],
    ).transformer.samples
    assert changed.prompts == ("a lighthouse above the sea", "一座灯塔")
    assert changed.edits == (("make it night", "day.png"), ("join them", "a.png", "b.png"))
    stage = "experiments/qwen_image_2/s1_256p_t2i.py"
    assert loading.load(stage, ["transformer.samples.prompts=()"]).transformer.samples.prompts == ()
    with pytest.raises(ValueError, match=r"it cannot become 'a lighthouse'; write a tuple of one as \('x',\)"):
        loading.load(f"{DEMO}:tiny", ['transformer.samples.prompts=("a lighthouse")'])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("transformer.optimiser.lr=1", "'optimiser' is not one of .*'optimizer'"),
        ("transformer.optimizer.lr.x=1", "has no key"),
        ("transformer.train.steps=many", "holds 4 .int., it cannot become 'many'"),
        ("transformer.optimizer.lr=" + "9" * 400, "it cannot become"),
        ("transformer.train.steps=None", "holds 4 .int., it cannot become None"),
        ("transformer.train.steps=True", "holds 4 .int., it cannot become True"),
        ("transformer.execution.remat=1", "holds False .bool., it cannot become 1"),
        ("transformer.model.rope_dims=('a',2)", "cannot become .'a', 2."),
        ("transformer.model.rope_dims=8", "holds .8, 12, 12. .tuple., it cannot become 8"),
        ("transformer.train={'steps': 3}", "is a group; change its keys"),
        ("transformer.train.steps", "must look like key.path=value"),
    ],
)
def test_wrong_overrides_are_refused_with_the_way_out(override, message):
    with pytest.raises(ValueError, match=message):
        loading.load(f"{DEMO}:tiny", [override])


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_platforms_that_mean_nothing_are_refused(platform):
    loaded = loading.load(f"{DEMO}:tiny", [f"platform={platform}"])
    with pytest.raises(ValueError, match=f"platform is '{platform}'; choose 'cpu', or ''"):
        devices.set_platform(loaded, (loaded.vae.mesh,))


def test_wrong_experiments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no Python file"):
        loading.load("experiments/nothing.py")
    with pytest.raises(ValueError, match="no form 'huge'"):
        loading.load(f"{DEMO}:huge")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="no function get_config"):
        loading.load(str(tmp_path / "empty.py"))


def test_difference_names_changed_added_and_removed_keys():
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "e": 0}
    assert recorded.difference(old, new) == ["a.c: 2 -> 3", "d: [1] -> 'absent'", "e: 'absent' -> 0"]


def test_claimed_folder_refuses_other_values(tmp_path):
    path = tmp_path / "config.json"
    recorded.claim(path, {"data": "a", "train": {"steps": 4}}, ("train.steps",))
    recorded.claim(path, {"data": "a", "train": {"steps": 8}}, ("train.steps",))
    with pytest.raises(ValueError, match=r"begun with other values[^$]*data: 'a' -> 'b'$"):
        recorded.claim(path, {"data": "b", "train": {"steps": 8}}, ("train.steps",))
    assert json.loads(path.read_text()) == {"data": "a", "train": {"steps": 8}}


@pytest.mark.parametrize("content", ['{"data": ', "", "[1]"])
def test_a_damaged_claim_is_named_with_the_way_out(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged: .* Bring it back from a copy; or delete it"):
        recorded.claim(path, {"data": "a"})
    assert path.read_text() == content
