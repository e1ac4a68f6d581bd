"""Faults of real clusters, injected into real processes; docs/faults.md lists them all.

test_resume.py has kills between and during saves, test_processes.py several processes, test_checkpoint_processes.py
faults of checkpoints, and test_watchdog.py a hung process.
"""

import json
import math
import shutil
import signal
import subprocess

import pytest

from qi2_jax.training.checkpoints import files
from qi2_jax.training.telemetry import accounting, metrics
from tests.training import runs_of
from tests.training.checkpoints.test_checkpoint_processes import can_mount, flip_one_bit
from tests.training.runs_of import EVERY, STEPS, begun_from, leaves, logged, run, start


def events(out, kind):
    return [event for event in accounting.read_events(out / accounting.EVENTS) if event["event"] == kind]


def largest(step):
    return max(step.glob("model/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def test_altered_checkpoints_are_passed_over_loudly_and_a_kill_meanwhile_changes_nothing(data, uninterrupted, tmp_path):
    out = begun_from(tmp_path / "run", uninterrupted, EVERY)
    for step in (2 * EVERY, STEPS):
        shutil.copytree(uninterrupted / "checkpoints" / str(step), out / "checkpoints" / str(step))
    flip_one_bit(largest(out / "checkpoints" / str(STEPS)))
    cut = largest(out / "checkpoints" / str(2 * EVERY))
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    shutil.copytree(out, tmp_path / "killed")
    text = run(data, out)
    assert f"{cut.name} has " in text and "has other contents" in text and f"resuming from step {EVERY}" in text
    assert len(events(out, accounting.DAMAGED)) == 2
    runs_of.assert_equal(out, uninterrupted)

    killed = start(data, tmp_path / "killed")
    killed.wait_until((tmp_path / "killed" / "checkpoints" / f"{STEPS}.damaged").exists)  # in the midst of restoring
    killed.signal(signal.SIGKILL)
    killed.done()
    run(data, tmp_path / "killed")
    runs_of.assert_equal(tmp_path / "killed", uninterrupted)


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(data, uninterrupted, tmp_path):
    """Uses a real file system, mounted in a namespace of its own, which needs no root."""
    if not can_mount():
        pytest.skip("needs `unshare -Urm` and tmpfs")
    begun_from(tmp_path / "copy", uninterrupted, EVERY)
    (tmp_path / "disk").mkdir()
    command = " ".join(f"'{part}'" for part in runs_of.command(data, tmp_path / "disk" / "run"))
    script = f"""
        mount -t tmpfs -o size=60m none {tmp_path}/disk
        cp -r {tmp_path}/copy {tmp_path}/disk/run
        cp -r {data}/model {tmp_path}/disk/run/model
        dd if=/dev/zero of={tmp_path}/disk/ballast bs=64k status=none
        truncate -s -400K {tmp_path}/disk/ballast
        {command} 2> {tmp_path}/refused; echo $?
        ls {tmp_path}/disk/run/checkpoints
        rm {tmp_path}/disk/ballast
        {command} 2> {tmp_path}/freed; echo $?
        cp -r {tmp_path}/disk/run {tmp_path}/run
    """
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, check=False, cwd=runs_of.ROOT
    )
    refused, freed = ((tmp_path / name).read_text() for name in ("refused", "freed"))
    told = [line for line in done.stdout.split("\n") if line.isdecimal()]
    assert told == ["1", str(EVERY), "0"], (done.stdout, refused[-2000:], freed[-2000:])
    assert "qi2 train: saving step 8 in" in refused and "No space left on device" in refused, refused[-2000:]
    assert "Traceback" not in refused
    runs_of.assert_equal(tmp_path / "run", uninterrupted)


def test_a_vanished_shard_is_named_and_the_run_goes_on_when_it_is_back(data, uninterrupted, tmp_path):
    """The shard becomes unreadable during the run, as when its server dies."""
    own, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, own)
    shard = own / "samples" / "64-1" / "unit-00004.arrayrecord"
    process = start(own, out)
    process.wait_until(lambda: logged(out).keys() & {2})
    content = shard.read_bytes()
    with shard.open("r+b") as file:  # files that are open stay readable when they are only renamed
        file.truncate(0)
    shard.rename(shard.with_suffix(".away"))
    done = process.done()
    assert done.status == 1 and f"qi2 train: {shard}" in done.text and "Traceback" not in done.text, done.text[-2000:]
    (saved,) = {max(files.steps(out / "checkpoints"))}
    assert saved == max(logged(out)) < STEPS and events(out, accounting.ERROR)
    again = start(own, out).done()
    assert again.status == 1 and str(shard) in again.text and "Traceback" not in again.text
    shard.with_suffix(".away").unlink()
    shard.write_bytes(content)
    run(own, out)
    runs_of.assert_equal(out, uninterrupted)


def test_a_batch_that_is_not_finite_is_left_out_and_many_end_the_run(data, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(data / "model", one / "model")
    runs_of.write_samples(one / "samples", one / "model", lambda index: index == 5)
    simple = ("data.mixture.tasks=(1, 0)", "transformer.batches_per_update=1", "transformer.batch_sizes=(8,)")
    simple += ("transformer.images_per_device=(0,)",)
    process = start(one, tmp_path / "run", *simple)
    text = process.done().text
    lines = logged(tmp_path / "run")
    skipped = lines[STEPS]["skipped_total"]
    assert 1 <= skipped == sum(math.isnan(line["loss"]) for line in lines.values()) < STEPS, text[-2000:]
    assert events(tmp_path / "run", accounting.SKIPPED)[-1]["total"] == skipped and "were skipped" in text
    assert all(math.isfinite(leaf.sum()) for leaf in leaves(tmp_path / "run").values())

    every = tmp_path / "every"
    shutil.copytree(data / "model", every / "model")
    runs_of.write_samples(every / "samples", every / "model", lambda index: True)
    for step in (3, 4):  # the same command tries one step more
        done = start(every, tmp_path / "lost", *simple, "transformer.train.max_skipped=3").done()
        assert done.status == 1 and f"qi2 train: {step} steps in a row up to step {step} were not finite" in done.text
        assert "Traceback" not in done.text and max(files.steps(tmp_path / "lost" / "checkpoints")) == step


def test_a_changed_config_is_refused_and_can_be_accepted(data, uninterrupted, tmp_path):
    out = begun_from(tmp_path / "run", uninterrupted, 2 * EVERY)
    shutil.copyfile(uninterrupted / metrics.FILE, out / metrics.FILE)
    shutil.copytree(data / "model", out / "model")
    scheduler = out / "model" / "scheduler" / "scheduler_config.json"
    changes = (*runs_of.DRAWN, "transformer.optimizer.lr=0.001", "transformer.timesteps.shift.max_shift=0.7")
    lines = ["optimizer.lr: 0.004 -> 0.001", "timesteps.shift.max_shift: 0.9 -> 0.7"]
    refused = start(data, out, *changes).done()
    assert refused.status == 1 and all(line in refused.text for line in lines) and "Traceback" not in refused.text
    assert "--accept-changes" in refused.text and files.steps(out / "checkpoints") == [2 * EVERY]
    assert json.loads(scheduler.read_text())["max_shift"] == 0.9
    text = run(data, out, *changes, "--accept-changes")
    assert "resumes with a changed config:\n  " + "\n  ".join(lines) in text
    assert events(out, accounting.RESTORE)[-1]["changes"] == lines
    assert json.loads(scheduler.read_text())["max_shift"] == 0.7  # with which its samples are drawn
    assert logged(out)[STEPS]["learning_rate"] < logged(uninterrupted)[STEPS]["learning_rate"]
