"""Checkpoints come back bit for bit, are whole or passed over, and are kept as the policy says."""

import functools
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.training.checkpoints import checksums, files, manager, retention
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.checkpoints.retention import Policy
from qi2_jax.training.step import TrainState

KEEP_ALL = Policy(keep=100)


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def state(step: int, width: int = 256) -> TrainState:
    """A state whose every leaf tells its step."""
    rows = jax.NamedSharding(mesh(), jax.P("fsdp"))
    draw = lambda key: jax.device_put(np.random.default_rng([step, key]).normal(size=(8, width)), rows)
    scalars = {name: jnp.int32(step % 3) for name in TrainState._fields if name.startswith("skipped")}
    trees = {"model": {"a": {"w": draw(0)}}, "ema": {"a": {"w": draw(1)}}, "optimizer": {"mu": draw(2), "nu": draw(3)}}
    return TrainState(step=jnp.int32(step), **trees, **scalars)


def abstract(width: int = 256) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, width))


def save(directory: pathlib.Path, steps, policy: Policy = KEEP_ALL, losses=None) -> None:
    checkpoints = Checkpoints(directory, policy)
    for step in steps:
        metrics = {"validation_loss": float(step) if losses is None else losses[step]}
        checkpoints.save(state(step), {"metrics": metrics, "position": 8 * step})
    checkpoints.close()


def assert_same(found: TrainState, wanted: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    jax.tree.map(lambda a, b: None if a.sharding.is_equivalent_to(b.sharding, a.ndim) else pytest.fail(), found, wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 4, 8 and 12. Not to be written to."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, (4, 8, 12))
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def arrays(step: pathlib.Path) -> pathlib.Path:
    """The file with the model's numbers."""
    return max((step / "model").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


# --- saving and restoring


def test_a_state_and_its_manifest_come_back_bit_for_bit(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest() == 12
    found, manifest = checkpoints.restore(abstract())
    assert_same(found, state(12))
    assert manifest == {"step": 12, "metrics": {"validation_loss": 12.0}, "position": 96}
    assert checkpoints.damaged == [] and json.loads((saved / "12" / "manifest.json").read_text()) == manifest
    checkpoints.close()


def test_nothing_is_restored_from_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.latest() is None and checkpoints.restore(abstract()) is None
    checkpoints.close()


def test_a_step_may_reuse_the_memory_of_the_state_at_once(tmp_path):
    """The caller is not blocked until the state is written, and what is written is what was given."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(tree):
        return jax.tree.map(lambda leaf: leaf + 1, tree)

    before = state(4, width=1 << 16)
    wanted = jax.tree.map(np.array, before)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(before)
    for _ in range(20):
        before = step(before)
    checkpoints.close()
    found, _ = Checkpoints(tmp_path).restore(abstract(1 << 16))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_same_step_is_not_saved_twice(copied):
    checkpoints = Checkpoints(copied, KEEP_ALL)
    checkpoints.save(state(12), {"metrics": {"loss": 0.0}})
    checkpoints.close()
    assert files.manifest(copied / "12")["position"] == 96


def test_manifests_hold_plain_json():
    given = {"loss": jnp.float32(0.5), "nan": float("nan"), "many": (np.int64(3), True, None, "x"), 4: {}}
    assert files.plain(given) == {"loss": 0.5, "nan": None, "many": [3, True, None, "x"], "4": {}}
    with pytest.raises(ValueError, match=r"contains .*PosixPath.* which JSON cannot represent"):
        files.plain({"path": pathlib.Path("x")})


def test_checkpoints_of_older_versions_are_read(copied):
    """Without manifest and checksums, and without a counter that came later."""
    older = TrainState._fields[-1]
    for step in (4, 8, 12):
        shutil.rmtree(copied / str(step))
    from orbax.checkpoint import v1 as ocp

    items = manager._items(state(16))
    del items["progress"][older]
    ocp.save_checkpointables(copied / "16", items)
    checkpoints = Checkpoints(copied)
    found, manifest = checkpoints.restore(abstract())
    assert manifest == {} and checkpoints.damaged == []
    assert_same(found, state(16)._replace(**{older: jax.device_put(0, abstract()[-1].sharding)}))
    checkpoints.close()


def test_leaves_that_do_not_match_are_named_and_the_checkpoint_stays(copied):
    checkpoints = Checkpoints(copied)
    with pytest.raises(ValueError, match="cannot be restored into this model") as caught:
        checkpoints.restore(abstract(width=32))
    for line in ("model: a.w is float32(8, 256), not float32(8, 32)", "optimizer: mu is", "ema: a.w is"):
        assert line in str(caught.value)
    assert files.steps(copied) == [4, 8, 12] and not files.damaged(copied)
    checkpoints.close()


# --- damage


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"truncated": truncate, "one_bit": flip_one_bit, "missing": os.unlink}
SAID = {"truncated": "bytes instead of", "one_bit": "has other contents than were saved", "missing": "is missing"}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["arrays", "optimizer/_METADATA", "_CHECKPOINT_METADATA", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_loudly(copied, which, damage, caplog):
    path = arrays(copied / "12") if which == "arrays" else copied / "12" / which
    DAMAGE[damage](path)
    name = path.relative_to(copied / "12").as_posix()
    checkpoints = Checkpoints(copied, KEEP_ALL)
    found, manifest = checkpoints.restore(abstract())
    assert_same(found, state(8))
    assert manifest["position"] == 64 and checkpoints.latest() == 8
    (told,) = checkpoints.damaged
    assert told.startswith("checkpoint 12 is damaged, now 12.damaged: ") and f"{name} " in told and SAID[damage] in told
    assert told in caplog.text and caplog.records[-1].levelno == logging.ERROR
    # The run reaches the step again.
    checkpoints.save(state(12))
    checkpoints.close()
    assert files.steps(copied) == [4, 8, 12] and files.damaged(copied) == ["12.damaged"]
    assert checksums.problems(copied / "12") == []


def test_a_file_too_many_and_spoilt_checksums_are_damage(copied):
    (copied / "12" / "model" / "d" / "stranger").write_bytes(b"x")
    truncate(copied / "8" / "checksums-0.json")
    checkpoints = Checkpoints(copied)
    assert_same(checkpoints.restore(abstract())[0], state(4))
    assert "model/d/stranger is not one of its files" in checkpoints.damaged[0]
    assert "checksums-0.json is unreadable" in checkpoints.damaged[1]
    checkpoints.close()


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_too(copied):
    (copied / "12.damaged").mkdir()
    truncate(arrays(copied / "12"))
    checkpoints = Checkpoints(copied)
    checkpoints.restore(abstract())
    checkpoints.close()
    assert files.damaged(copied) == ["12.damaged", "12.damaged-2"]


def test_without_a_whole_checkpoint_nothing_begins_anew_by_itself(copied):
    for step in (4, 8, 12):
        truncate(arrays(copied / str(step)))
    for _ in range(2):
        checkpoints = Checkpoints(copied)
        with pytest.raises(ValueError, match=r"no checkpoint in .* is intact. Restore one from a backup") as caught:
            checkpoints.restore(abstract())
        assert all(f"{copied / str(step)}: model/" in str(caught.value) for step in (4, 8, 12))
        checkpoints.close()
    assert files.steps(copied) == [4, 8, 12]


def test_a_file_that_no_process_hashed_makes_a_step_unverified_and_not_damaged(copied, monkeypatch):
    """The second of two processes sees an old listing, as on a network file system."""
    step, of_files = copied / "12", files.files
    (step / "checksums-0.json").unlink()
    checksums.record(step, 0, 2)
    share = sorted(name for name in of_files(step) if not name.startswith(("checksums", "manifest")))[1::2]
    monkeypatch.setattr(files, "files", lambda path: {n: s for n, s in of_files(path).items() if n != share[-1]})
    checksums.record(step, 1, 2)
    monkeypatch.undo()
    assert not checksums.is_verified(step) and checksums.problems(step) == [] and checksums.is_recorded(step, 2)
    assert Checkpoints(copied).latest() == 12
    checksums.record(step, 1, 2)
    assert checksums.is_verified(step) and checksums.problems(step) == []


def test_checksums_of_older_versions_without_a_list_of_all_files_count(copied):
    path = copied / "12" / "checksums-0.json"
    found = json.loads(path.read_text())
    assert found["all_files"] == sorted(found["files"])
    del found["all_files"]
    path.write_text(json.dumps(found))
    assert checksums.is_verified(copied / "12")
    (copied / "12" / "extra").touch()
    assert checksums.problems(copied / "12") == ["extra is not one of its files"]


def test_a_marked_step_whose_deletion_was_cut_short_comes_back(copied):
    for step in (4, 8):
        (copied / str(step)).rename(copied / f"{step}.deleted")
    (copied / "4.keep").touch()
    assert files.clean(copied) == ["8.deleted"]
    assert files.steps(copied) == [4, 12] and checksums.problems(copied / "4") == []


def test_without_checksums_a_checkpoint_is_used_and_said_to_be_unverified(copied, caplog):
    (copied / "12" / "checksums-0.json").unlink()
    assert not checksums.is_verified(copied / "12") and checksums.problems(copied / "12") == []
    checkpoints = Checkpoints(copied)
    assert_same(checkpoints.restore(abstract())[0], state(12))
    checkpoints.close()
    assert f"{copied / '12'} is unverified" in caplog.text and checkpoints.damaged == []


@pytest.mark.parametrize("which", ["arrays", "ema/_METADATA", "optimizer"])
def test_without_checksums_what_cannot_be_read_is_damaged_too(copied, which):
    (copied / "12" / "checksums-0.json").unlink()
    if which == "optimizer":
        shutil.rmtree(copied / "12" / which)
    else:
        truncate(arrays(copied / "12") if which == "arrays" else copied / "12" / which)
    checkpoints = Checkpoints(copied)
    assert_same(checkpoints.restore(abstract())[0], state(8))
    assert len(checkpoints.damaged) == 1 and files.damaged(copied) == ["12.damaged"]
    checkpoints.close()


def test_checksums_can_be_switched_off(tmp_path):
    save(tmp_path, (4,), Policy(checksums=False))
    assert not list(tmp_path.glob("*/checksums*")) and not checksums.is_verified(tmp_path / "4")


def test_checksums_are_those_of_the_command_line_tool(saved):
    if shutil.which("b2sum") is None:
        pytest.skip("needs b2sum of coreutils")
    entries = json.loads((saved / "12" / "checksums-0.json").read_text())["files"]
    assert entries.keys() == files.files(saved / "12").keys() - {"checksums-0.json"}
    lines = "".join(f"{entry['blake2b-256']}  {name}\n" for name, entry in entries.items())
    subprocess.run(["b2sum", "-l", "256", "--check", "--quiet"], cwd=saved / "12", input=lines, text=True, check=True)


# --- retention

LOSSES = dict.fromkeys(range(1, 13), 1.0) | {3: 0.25, 5: 0.5, 7: float("nan"), 9: 0.125}


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(keep=1), [12]),
        (Policy(keep=3), [10, 11, 12]),
        (Policy(keep=1, keep_every=5), [5, 10, 12]),
        (Policy(keep=1, keep_best=2), [3, 9, 12]),
        (Policy(keep=2, keep_every=4, keep_best=3), [3, 4, 5, 8, 9, 11, 12]),
        (Policy(keep=1, keep_best=2, best_metric="unknown"), [12]),
    ],
)
def test_latest_regular_and_best_checkpoints_are_kept(tmp_path, policy, kept):
    for step, loss in LOSSES.items():
        (tmp_path / str(step)).mkdir()
        files.write_manifest(tmp_path / str(step), files.plain({"metrics": {"validation_loss": loss}}))
        checksums.record(tmp_path / str(step))
        retention.apply(tmp_path, policy)
    assert files.steps(tmp_path) == kept


def test_a_run_deletes_what_its_policy_does_not_keep(tmp_path):
    save(tmp_path, range(1, 7), Policy(keep=2, keep_best=1), {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0})
    assert files.steps(tmp_path) == [2, 5, 6] and len(list(tmp_path.iterdir())) == 3


def test_marks_are_honoured_also_while_a_run_saves(tmp_path):
    checkpoints = Checkpoints(tmp_path, Policy(keep=1))
    for step in (4, 8, 12, 16):
        checkpoints.save(state(step))
        checkpoints.wait()
        if step == 8:
            files.keep(tmp_path, 8)
    assert files.steps(tmp_path) == [8, 16]
    files.unkeep(tmp_path, 8)
    checkpoints.save(state(20))
    checkpoints.close()
    assert files.steps(tmp_path) == [20]
    for change, message in ((files.keep, "has no checkpoint of step 8"), (files.unkeep, "step 8 .* is not marked")):
        with pytest.raises(ValueError, match=message):
            change(tmp_path, 8)
    assert not list(tmp_path.glob("*.keep"))


def test_a_mark_that_comes_with_the_deletion_wins(copied, monkeypatch):
    rename = os.rename

    def mark_meanwhile(source, target):
        (copied / "4.keep").touch()
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", mark_meanwhile)
    assert not files.remove(copied, 4) and files.steps(copied) == [4, 8, 12]


def test_the_newest_verified_checkpoint_outlives_unverified_ones(copied):
    for step in (8, 12):
        (copied / str(step) / "checksums-0.json").unlink()
    assert retention.apply(copied, Policy(keep=1)) == [8]
    assert files.steps(copied) == [4, 12]


def test_policies_are_checked():
    for key, value in (("keep", 0), ("keep_every", -1), ("keep_best", -2)):
        with pytest.raises(ValueError, match=rf"{key} is {value}; it must be at least"):
            Policy(**{key: value})
    with pytest.raises(ValueError, match="best_metric names no metric"):
        Policy(keep_best=1, best_metric="")


def test_checksums_that_do_not_fit_on_the_disk_fail_the_save_but_not_the_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "checksums-0.json")

    monkeypatch.setattr(checksums, "write_json_atomic", full)
    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    checkpoints.save(state(4))
    with pytest.raises(ValueError, match=r"saving step 4 in .* failed: .*No space left.*Earlier checkpoints \[4\]"):
        checkpoints.close()
    assert_same(Checkpoints(tmp_path).restore(abstract())[0], state(4))


LATE_WRITE = """
import asyncio, gc, tensorstore
from qi2_jax.training.checkpoints import manager

refused, late = tensorstore.Promise.new(), tensorstore.Promise.new()
refused[0].set_exception(OSError("No space left on device"))

async def written(pair):
    await pair[1]

async def save():
    await asyncio.gather(written(late), written(refused))

loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(save())
except Exception as error:
    print(error)
loop.close()
late[0].set_result(None)

class Other:
    def __del__(self):
        raise RuntimeError("of another cause")

Other()
"""


def test_writes_that_end_after_a_failed_save_print_no_traceback():
    done = subprocess.run([sys.executable, "-c", LATE_WRITE], capture_output=True, text=True, check=True)
    assert "No space left on device" in done.stdout
    assert "Event loop is closed" not in done.stderr and "of another cause" in done.stderr, done.stderr
