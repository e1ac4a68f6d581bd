"""Differences between configs, what dataclasses declare about them, and the record of a folder's config."""

import dataclasses
import json
from collections.abc import Mapping

import pytest

from qi2_jax.config import recorded
from qi2_jax.config.changes import ABSENT, Change, differences, is_changeable, is_within, means_default
from qi2_jax.config.fields import changeable, fixed
from qi2_jax.training.config import TrainingConfig
from qi2_jax.workflows.config import CurriculumExperiment, DemoExperiment, StageExperiment


def test_differences_name_changed_added_and_removed_keys():
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "e": 0}
    changes = differences(old, new)
    assert changes == [Change("a.c", 2, 3), Change("d", [1], ABSENT), Change("e", ABSENT, 0)]
    assert [str(change) for change in changes] == ["a.c: 2 -> 3", "d: [1] -> absent", "e: absent -> 0"]


def test_a_group_does_not_contain_keys_that_only_begin_like_it():
    assert is_within("train.steps", "train") and is_within("train", "train")
    assert not is_within("training.steps", "train") and not is_within("train", "train.steps")


@dataclasses.dataclass(frozen=True)
class Inner:
    free: int = changeable()
    kept: int = 0


@dataclasses.dataclass(frozen=True)
class Outer:
    group: Inner = changeable()
    held: Inner = fixed()
    plain: Inner = dataclasses.field()
    named: Mapping[str, Inner] = dataclasses.field()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        *(("group.free", True), ("group.kept", True), ("group", True), ("group.of_an_older_version", True)),
        *(("held.free", False), ("held", False)),
        *(("plain.free", True), ("plain.kept", False), ("plain", False), ("plain.free.deeper", True)),
        *(("named.x.free", True), ("named.x.kept", False), ("named.x", False), ("named", False)),
        *(("other", False), ("plain.other", False), ("", False)),
    ],
)
def test_the_outermost_declaration_decides(key, expected):
    assert is_changeable(Outer, key) == expected


RUN = ("train.steps", "checkpoint.keep", "validation.every", "samples.prompts", "profile.start", "mesh.fsdp")
STAGE = (*RUN, "images_per_device", "start.folder")
KEPT = ("seed", "optimizer.lr", "ema_decay", "model.layers", "validation.samples", "batch_sizes", "lora.rank", "data.x")


def test_a_run_may_move_its_end_its_reports_and_its_machines():
    assert all(is_changeable(TrainingConfig, key) for key in RUN)
    assert all(is_changeable(StageExperiment, f"transformer.{key}") for key in STAGE)
    assert not any(is_changeable(TrainingConfig, key) for key in KEPT)
    assert not any(is_changeable(StageExperiment, f"transformer.{key}") for key in KEPT)


def test_a_demo_may_change_only_its_last_training_and_what_follows():
    free = ("transformer.train.steps", "sample.seed", "compare.images", "expect.nearest_to_own", "data.workers")
    assert all(is_changeable(DemoExperiment, key) for key in (*free, "compilation_cache"))
    kept = ("vae.train.steps", "encode.batch_size", "encode.mesh.data", "data.sides", "encoder.seed", "source")
    assert not any(is_changeable(DemoExperiment, key) for key in (*kept, "platform", "transformer.seed"))


def test_a_curriculum_may_change_what_no_result_depends_on():
    stage = ("compilation_cache", "encode.batch_size", "encode.mesh.data", "transformer.train.steps")
    free = ("compilation_cache", "start.folder", "corpus.workers", "vae.train.steps", "vae.mesh.data")
    assert all(is_changeable(CurriculumExperiment, key) for key in (*free, *(f"stages.a.{key}" for key in stage)))
    kept = ("corpus.edits", "model.folder", "encoder.seed", "vae.crop", "order", "stages.a.encode.dtype", "platform")
    assert not any(is_changeable(CurriculumExperiment, key) for key in (*kept, "stages.a.data.sides", "stages.a"))


@pytest.mark.parametrize(
    ("key", "old", "new", "expected"),
    [
        ("vae.alignment.relaxed_weight", ABSENT, 0.0, True),
        ("vae.alignment.relaxed_weight", ABSENT, 0.1, False),
        ("vae.alignment.relaxed_weight", 0.1, 0.0, False),
        ("vae.alignment.relaxed_weight", ABSENT, ABSENT, False),
        ("vae.unmirrored_kinds", ABSENT, [], True),
        ("vae.unmirrored_kinds", ABSENT, ["text"], False),
        ("vae.later_phases.at_48.ratios", ABSENT, ["1:1"], True),
        ("vae.later_phases.at_48.start", ABSENT, 0, False),  # without a default
        ("vae.execution.dtype", ABSENT, "float32", False),
        ("vae.kinds.text", ABSENT, [], False),
        ("vae.other", ABSENT, 0, False),
    ],
)
def test_a_key_that_the_record_lacks_means_its_default(key, old, new, expected):
    assert means_default(CurriculumExperiment, Change(key, old, new)) == expected


def test_a_folder_continues_if_a_new_key_has_its_default(tmp_path):
    path = tmp_path / "config.json"
    recorded.claim(path, {"free": 0})
    assert recorded.claim(path, {"free": 0, "kept": 0}, cls=Inner) == []
    assert json.loads(path.read_text()) == {"free": 0, "kept": 0}
    path.write_text('{"free": 0}')
    with pytest.raises(ValueError, match="kept: absent -> 1"):
        recorded.claim(path, {"free": 0, "kept": 1}, cls=Inner)


def may_change(key):
    return is_within(key, "train.steps")


def test_a_recorded_folder_refuses_other_values(tmp_path):
    path = tmp_path / "config.json"
    recorded.claim(path, {"data": "a", "train": {"steps": 4}}, may_change)
    allowed = recorded.claim(path, {"data": "a", "train": {"steps": 8}}, may_change)
    assert allowed == [Change("train.steps", 4, 8)]
    with pytest.raises(ValueError, match=r"created with a different config; rerun with[^$]*data: 'a' -> 'b'$"):
        recorded.claim(path, {"data": "b", "train": {"steps": 8}}, may_change)
    assert json.loads(path.read_text()) == {"data": "a", "train": {"steps": 8}}


@pytest.mark.parametrize("content", ['{"data": ', "", "[1]"])
def test_a_damaged_record_is_named_with_the_way_out(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged: .* Restore it from a copy; or delete it"):
        recorded.claim(path, {"data": "a"})
    assert path.read_text() == content
