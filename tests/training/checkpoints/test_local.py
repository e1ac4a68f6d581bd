"""Local checkpoints: bit for bit, also where a process has lost its own, and never mixed or taken when damaged."""

import logging
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from qi2_jax.training.checkpoints import files, local
from qi2_jax.training.checkpoints.local import LocalCheckpoints
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.checkpoints.retention import Policy
from qi2_jax.training.telemetry import accounting
from tests.training import runs_of
from tests.training.checkpoints.test_manager import abstract, assert_same, mesh, state
from tests.training.runs_of import EVERY, begun_from, logged, start

PROGRAM = """
import pathlib, shutil, sys
import jax
process, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
import numpy as np
from qi2_jax import sharding
from qi2_jax.runtime import processes
from qi2_jax.training.checkpoints import files, checksums
from qi2_jax.training.checkpoints.local import LocalCheckpoints

bits = np.random.default_rng(0).integers(0, 1 << 32, (16, 8), np.uint32).view(np.float32)  # NaN and -0.0 among them
bits[0, :2] = -0.0, np.nan
VALUES = {"model/w": bits, "model/wide": bits.astype("bfloat16"), "optimizer/b": bits[0], "progress/step": np.int32(5)}
SPECS = {"model/w": ("fsdp", "tensor"), "model/wide": ("fsdp",), "optimizer/b": (None,), "progress/step": ()}

def leaves(shape):
    mesh = sharding.make_mesh(sharding.MeshShape(*shape))
    at = {name: jax.NamedSharding(mesh, jax.P(*spec)) for name, spec in SPECS.items()}
    return {name: jax.make_array_from_callback(np.shape(value), at[name], lambda index: np.asarray(value)[index])
            for name, value in VALUES.items()}

def like(shape):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in leaves(shape).items()}

def saved(name, *steps, shape=(2, 2, 2)):
    local = LocalCheckpoints(folder / name / f"process-{process}")
    for step in steps:
        local.save(step, leaves(shape), {"metrics": {"loss": float(step)}})
    local.close()
    return LocalCheckpoints(local.directory)

def told(name, local, after=0, shape=(2, 2, 2)):
    found = local.restore(like(shape), after)
    print(name, found and found[0], [int(path.name) for path in sorted(local.directory.iterdir())], flush=True)
    if found is not None:
        assert found[2] == {"step": found[0], "metrics": {"loss": float(found[0])}}, found[2]
        for name, wanted in leaves(shape).items():
            assert found[1][name].sharding.is_equivalent_to(wanted.sharding, wanted.ndim)
            for have, want in zip(found[1][name].addressable_shards, wanted.addressable_shards, strict=True):
                assert np.asarray(have.data).tobytes() == np.asarray(want.data).tobytes(), name

def lost(local, *steps):
    if process == 1:
        for step in steps:
            shutil.rmtree(local.directory / str(step))

told("whole", saved("whole", 4, 6, 8))
told("old", saved("old", 4, 6), after=6)
one = saved("one", 4, 6)
lost(one, 6)
told("one", one)
disk = saved("disk", 4, 6)
lost(disk, 4, 6)
told("disk", disk)
both = saved("both", 4)
shutil.rmtree(both.directory / "4")
told("both", both)
mixed = saved("mixed", 4, 6)
if process == 1:  # the newest is of another life
    path = mixed.directory / "6"
    files.write_manifest(path, files.manifest(path) | {"life": "1"})
    checksums.record(path)
told("mixed", mixed)
split = saved("split", 4, 6, shape=(1, 4, 2))  # no process holds what another does
lost(split, 6)
told("split", split, shape=(1, 4, 2))
alone = saved("alone", 4, shape=(1, 4, 2))
lost(alone, 4)
told("alone", alone, shape=(1, 4, 2))
told("mesh", saved("mesh", 4), shape=(1, 4, 2))
processes.gather("")
"""


def test_two_processes_put_together_what_is_there(tmp_path):
    printed = runs_of.printed_by_two(PROGRAM, tmp_path)
    lines = [[line for line in text.splitlines() if re.fullmatch(r"\w+ (\d+|None) \[.*\]", line)] for text in printed]
    expected = ["whole 8 [6, 8]", "old None [4, 6]", "one 6 {one}", "disk 6 {disk}", "both None []", "mixed 6 [4, 6]"]
    expected += ["split 4 {split}", "alone None {alone}", "mesh None [4]"]
    first = {"one": "[4, 6]", "disk": "[4, 6]", "split": "[4]", "alone": "[4]"}
    second = {"one": "[4]", "disk": "[]", "split": "[4]", "alone": "[]"}
    for printed_lines, own in zip(lines, (first, second), strict=True):
        assert printed_lines == [line.format(**own) for line in expected]
    assert "parts of processes [1] were lost" in printed[0]
    assert "steps [4] lack parts of the state" in printed[0]


def saved_locally(run: pathlib.Path, *steps: int) -> tuple[Checkpoints, pathlib.Path]:
    """Step 4 for all, the others locally: as another start finds them, and where these are."""
    checkpoints = Checkpoints(run / "checkpoints", Policy(local_every=1, local_folder=str(run / "disk")))
    checkpoints.begin_locally()
    for step in (4, *steps):
        checkpoints.save_locally(state(step), {"metrics": {"loss": float(step)}})
    checkpoints.close()
    return Checkpoints(run / "checkpoints", checkpoints.policy), checkpoints.local.directory


def restored(checkpoints: Checkpoints) -> int:
    found = Checkpoints(checkpoints.directory, checkpoints.policy).restore(abstract())
    return int(found[0].step)


def test_the_newest_of_all_is_restored_and_the_first_is_none_of_them(tmp_path):
    checkpoints, place = saved_locally(tmp_path / "run", 5, 6, 7)
    assert files.steps(checkpoints.directory) == [4] and files.steps(place) == [6, 7]
    found, manifest = checkpoints.restore(abstract())
    assert_same(found, state(7))
    assert manifest == {"step": 7, "metrics": {"loss": 7.0}}
    checkpoints.begin_locally()  # goes on in the same place
    assert checkpoints.local.directory == place and files.steps(place) == [6, 7]
    checkpoints.save(state(8))
    checkpoints.close()
    assert restored(checkpoints) == 8
    checkpoints.end_locally()
    assert not place.parent.exists() and not (tmp_path / "run" / local.ID).exists()


@pytest.mark.parametrize("how", ["from scratch", "without", "another persistent one"])
def test_what_a_run_has_left_behind_is_never_restored(how, tmp_path):
    """Begun anew, continued without local checkpoints, or from another persistent one: then switched on again."""
    checkpoints, place = saved_locally(tmp_path / "run", 5, 6)
    if how == "from scratch":
        shutil.rmtree(checkpoints.directory)
        checkpoints = Checkpoints(checkpoints.directory, checkpoints.policy)
    elif how == "without":
        checkpoints = Checkpoints(checkpoints.directory, Policy(local_folder=checkpoints.policy.local_folder))
        assert int(checkpoints.restore(abstract())[0].step) == 4
    else:
        shutil.copytree(checkpoints.directory / "4", checkpoints.directory / "9")
        checkpoints = Checkpoints(checkpoints.directory, checkpoints.policy)
        assert checkpoints.restore(abstract()) is not None
        shutil.rmtree(checkpoints.directory / "9")
    checkpoints.begin_locally()
    if how == "from scratch":
        checkpoints.save(state(4))
    checkpoints.close()
    assert not place.exists()
    switched_on = Checkpoints(checkpoints.directory, Policy(local_every=1, local_folder=str(tmp_path / "run" / "disk")))
    assert restored(switched_on) == 4


def test_a_copy_of_a_run_does_not_share_its_local_checkpoints(tmp_path):
    checkpoints, place = saved_locally(tmp_path / "run", 5, 6)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("disk"))
    copy = Checkpoints(tmp_path / "copy" / "checkpoints", checkpoints.policy)
    assert int(copy.restore(abstract())[0].step) == 4
    copy.begin_locally()
    copy.save_locally(state(9))
    copy.close()
    assert copy.local.directory != place and files.steps(place) == [5, 6] and restored(checkpoints) == 6


def test_a_disk_that_cannot_be_used_costs_local_checkpoints_and_not_the_run(tmp_path, caplog):
    (tmp_path / "disk").write_text("a file, where a folder should be")
    checkpoints = Checkpoints(tmp_path / "checkpoints", Policy(local_every=1, local_folder=str(tmp_path / "disk")))
    checkpoints.begin_locally()
    for step in (4, 5, 6):
        checkpoints.save_locally(state(step))
    checkpoints.close()
    assert "no local checkpoint of step 5" in caplog.text and restored(checkpoints) == 4


def test_what_more_processes_left_is_removed_at_the_end(tmp_path):
    checkpoints, place = saved_locally(tmp_path / "run", 5)
    shutil.copytree(place, place.with_name("process-3"))
    checkpoints.restore(abstract())
    checkpoints.begin_locally()
    checkpoints.end_locally()
    assert not place.parent.exists()


def test_a_refused_start_leaves_everything_as_it_is(tmp_path, caplog):
    checkpoints, place = saved_locally(tmp_path / "run", 5, 6)
    with pytest.raises(ValueError, match="cannot be restored into this model"):
        checkpoints.restore(abstract(width=512))
    assert "it lacks 32 parts, such as ema/a.w float32[0:1,0:512]" in caplog.text
    assert files.steps(place) == [5, 6] and restored(checkpoints) == 6


def test_nothing_is_local_before_something_is_persistent(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", Policy(local_every=1, local_folder=str(tmp_path / "disk")))
    checkpoints.begin_locally()
    checkpoints.save_locally(state(4))
    checkpoints.save_locally(state(5))  # while that is still being written
    assert files.steps(checkpoints.directory) == [4]
    checkpoints.close()
    assert files.steps(checkpoints.local.directory) == [5]


def test_what_the_next_step_overwrites_is_saved_as_it_was(tmp_path):
    local = LocalCheckpoints(tmp_path)
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.device_put(np.zeros((8, 1 << 20), np.float32), jax.NamedSharding(mesh(), jax.P("fsdp")))
    for step in (1, 2):
        x = advance(x)
        local.save(step, {"x": x}, {})
        for _ in range(5):
            x = advance(x)
    like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
    local.close()
    step, leaves, _ = LocalCheckpoints(tmp_path).restore(like, 0)
    assert step == 2 and (np.asarray(leaves["x"]) == 7).all()


def test_what_is_damaged_is_passed_over_loudly(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    checkpoints, place = saved_locally(tmp_path / "run", 5, 6)
    parts = place / "6" / "parts.safetensors"
    data = bytearray(parts.read_bytes())
    data[-1] ^= 1
    parts.write_bytes(data)
    assert_same(checkpoints.restore(abstract())[0], state(5))
    assert f"{parts.parent} is passed over: parts.safetensors has other contents" in caplog.text
    assert files.steps(place) == [5]  # what came after is gone: it will be saved again
    (place / "5" / "checksums-0.json").unlink()
    assert restored(checkpoints) == 4 and "it has no checksums" in caplog.text
    (tmp_path / "run" / local.ID).write_text("../../etc")
    assert restored(checkpoints) == 4


def test_one_that_cannot_be_read_costs_no_other(tmp_path, caplog):
    checkpoints, place = saved_locally(tmp_path / "run", 5, 6)
    checksums = place / "5" / "checksums-0.json"
    checksums.unlink()
    checksums.mkdir()  # reading it fails with an OSError, as on a bad sector
    assert restored(checkpoints) == 6 and f"{place / '5'} cannot be read and is passed over" in caplog.text


def test_an_old_one_that_cannot_be_deleted_costs_no_save(tmp_path, caplog, monkeypatch):
    checkpoints, place = saved_locally(tmp_path / "run", 5, 6)
    checkpoints.restore(abstract())

    def failing(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(local.files, "remove", failing)
        checkpoints.save_locally(state(7))
        checkpoints.local.close()
    assert files.steps(place) == [5, 6, 7] and "5 cannot be deleted" in caplog.text
    assert "no local checkpoint" not in caplog.text
    for later in (8, 9):  # of a life that is left behind, and could not be deleted either
        shutil.copytree(place / "7", place / str(later))
    checkpoints.local = LocalCheckpoints(place)
    checkpoints.save_locally(state(7))
    checkpoints.local.close()
    assert files.steps(place) == [6, 7, 8, 9]


def test_a_save_that_fails_is_told_and_costs_nothing_else(tmp_path, caplog, monkeypatch):
    checkpoints, place = saved_locally(tmp_path / "run", 5)
    checkpoints.restore(abstract())

    def full(*_):
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr(local.safetensors.numpy, "save_file", full)
        checkpoints.save_locally(state(6))
        checkpoints.local.close()
    assert "no local checkpoint of step 6" in caplog.text and "full" in caplog.text
    assert [path.name for path in place.iterdir()] == ["5"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    local = LocalCheckpoints(tmp_path)
    files.unfinished_path(tmp_path, 7).mkdir()
    local.close()
    LocalCheckpoints(tmp_path).close()
    assert [*tmp_path.iterdir()] == []


def test_a_local_folder_must_be_named():
    with pytest.raises(ValueError, match="local_folder 'disk' is not an absolute path"):
        Policy(local_every=5, local_folder="disk")


def test_a_killed_run_goes_on_from_the_disk_of_its_host(data, uninterrupted, tmp_path):
    """Begun from step 4, never saved for all again; killed after step 5, it must not begin at 4."""
    out = begun_from(tmp_path / "run", uninterrupted, EVERY)
    local = ("transformer.checkpoint.local_every=1", f"transformer.checkpoint.local_folder={tmp_path / 'disk'}")
    more = (*local, "transformer.checkpoint.every=1000")
    process = start(data, out, *more, wait_at=EVERY + 2)
    process.wait_until(lambda: [*(tmp_path / "disk").glob("run-*/process-0/5")])
    process.signal(signal.SIGKILL)
    process.done()
    assert files.steps(out / "checkpoints") == [EVERY]
    text = runs_of.run(data, out, *more)
    restored = [
        event["step"] for event in accounting.read_events(out / accounting.EVENTS) if event["event"] == "restore"
    ]
    assert restored[0] == EVERY and restored[1] >= 5 and "resuming from the local checkpoint of step" in text
    assert sorted(logged(out)) == list(range(EVERY + 1, runs_of.STEPS + 1))
    runs_of.assert_equal(out, uninterrupted)
