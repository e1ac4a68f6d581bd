"""Experiments load, and overrides are checked."""

import pytest

from qi2_jax.config import loading

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
    with pytest.raises(ValueError, match=r"it cannot become 'a lighthouse'; write a tuple with one item as \('x',\)"):
        loading.load(f"{DEMO}:tiny", ['transformer.samples.prompts=("a lighthouse")'])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("transformer.optimiser.lr=1", "unknown config key 'transformer.optimiser.lr'; did you mean 'optimizer'?"),
        ("transformer.optimizer.lr.x=1", "unknown config key 'transformer.optimizer.lr.x'; known keys: none"),
        ("transformer.train.steps=many", "has the value 4 .int.; it cannot become 'many'"),
        ("transformer.optimizer.lr=" + "9" * 400, "it cannot become"),
        ("transformer.train.steps=None", "has the value 4 .int.; it cannot become None"),
        ("transformer.train.steps=True", "has the value 4 .int.; it cannot become True"),
        ("transformer.execution.remat=1", "has the value False .bool.; it cannot become 1"),
        ("transformer.model.rope_dims=('a',2)", "cannot become .'a', 2."),
        ("transformer.model.rope_dims=8", "has the value .8, 12, 12. .tuple.; it cannot become 8"),
        ("transformer.train={'steps': 3}", "is a group; change its keys"),
        ("transformer.train.steps", "must look like key.path=value"),
    ],
)
def test_wrong_overrides_are_refused_with_the_way_out(override, message):
    with pytest.raises(ValueError, match=message):
        loading.load(f"{DEMO}:tiny", [override])


def test_wrong_experiments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a Python file"):
        loading.load("experiments/nothing.py")
    with pytest.raises(ValueError, match="no form 'huge'"):
        loading.load(f"{DEMO}:huge")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="no function get_config"):
        loading.load(str(tmp_path / "empty.py"))
