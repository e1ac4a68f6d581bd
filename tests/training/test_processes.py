"""Several processes train as one process does, may change their number on resume, and end together."""

import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from qi2_jax.runtime import processes
from qi2_jax.training.checkpoints import files
from qi2_jax.training.telemetry import watchdog
from tests.training import runs_of
from tests.training.checkpoints.test_checkpoint_processes import overwrite
from tests.training.runs_of import EVERY, STEPS, begun_from, logged, start_several

PROGRAM = """
import sys
import jax
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
import jax.numpy as jnp
import numpy as np
from qi2_jax import sharding

for shape in ((8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)):
    # Devices in another order than the processes, as on a torus.
    devices = [jax.devices()[index] for index in (0, 5, 2, 7, 4, 1, 6, 3)]
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.AXES)
    whole = np.arange(48.0).reshape(16, 3)
    own = sharding.local_rows(mesh, 16)
    batch = sharding.put_batch(mesh, whole[list(own)], 16)
    for shard in batch.addressable_shards:
        assert np.array_equal(shard.data, whole[shard.index]), (shape, shard)
    weights = jnp.arange(16.0)
    assert float(jax.jit(lambda x: (weights @ x).sum())(batch)) == (np.arange(16.0) @ whole).sum()
    if len(own) < 16:
        try:
            sharding.put_batch(mesh, whole, 16)
        except ValueError as error:
            assert "16 rows; this process holds" in str(error)
        else:
            raise AssertionError("rows of other processes were taken for own ones")
print("same batch", process)
"""


def test_texts_of_many_lengths_are_sent_in_few_shapes(monkeypatch):
    sent = []

    def allgather(array):
        sent.append(np.shape(array))
        return np.stack([array, array])

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    texts = ["", "a", "ä" * 512, "b" * 1023, "c" * 1025]
    assert [processes.gather(text) for text in texts] == [[text, text] for text in texts]
    assert set(sent) == {(), (1024,), (2048,)}


def test_rows_of_two_processes_make_one_batch():
    for process, printed in enumerate(runs_of.printed_by_two(PROGRAM)):
        assert f"same batch {process}" in printed


AGREEING = """
import signal, sys, time
import jax
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from qi2_jax.runtime import processes, signals
signals.listen(interruptible=False)

with processes.raise_together():
    pass
try:
    with processes.raise_together():
        if process == 1:
            raise ValueError("\\0SIGTERM of another kind")
except ValueError as error:
    print("refused", error, flush=True)
with signals.deferred():
    signal.raise_signal(signal.SIGTERM) if process == 1 else None
    with processes.raise_together(interruptible=False):  # training answers by itself
        print("trains", signals.received(), flush=True)
    signals._received = False
print("waits", flush=True)
try:
    with processes.raise_together():
        time.sleep(60 if process == 1 else 0)
    print("not reached")
finally:
    print("leaves", flush=True)
"""


def test_sigterm_outside_of_training_ends_all():
    """Both processes are in the block when one of them receives the signal."""
    both = runs_of.start_two(AGREEING)
    both[1].wait_until(lambda: "waits" in both[1].printed())
    both[1].signal(signal.SIGTERM)
    for process, running in enumerate(both):
        status, text = running.done(30)
        lines = [line for line in text.splitlines() if line.split()[0] in ("refused", "trains", "waits", "leaves")]
        assert status == 0 and "not reached" not in text and "Traceback" not in text, text
        assert lines[1:] == [f"trains {process == 1}", "waits", "leaves"] and "of another kind" in lines[0], lines
        assert ("SIGTERM: stopped; run again" in text) == (process == 0)


SAMPLING = """
import sys
import jax
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
import numpy as np
from qi2_jax import sharding
from qi2_jax.diffusion import sampler
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.sequence import Layout, place

mesh = sharding.make_mesh(sharding.MeshShape(2, 2, 2))
config = MMDiTConfig(layers=2, heads=2, head_width=32, rope_dims=(8, 12, 12), text_width=48)
make = lambda: MMDiT(config, key=jax.random.key(0))
model = jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make), mesh))()
layout, count = Layout(text=(16,), target=24), 16
positions, valid = place(layout, [9], target=(4, 6))
rows = len(sharding.local_rows(mesh, count))
put = lambda row: sharding.put_batch(mesh, np.stack([row] * rows), count)
given = Conditioning(put(np.ones((16, 48), np.float32)), put(positions), put(valid))
run = Execution(kernel=sharding.Attention(mesh), constrain=sharding.Constrain(mesh))
noise = put(np.ones((24, 64), np.float32))
drawn = sampler.sample(model, noise, np.linspace(1, 0, 61), sampler.Prompt(layout, given), execution=run)
print("drawn", jax.block_until_ready(drawn).shape, flush=True)
"""


def test_many_steps_of_sampling_on_two_processes_come_to_an_end():
    """The runtime deadlocks if the host runs too far ahead of the devices."""
    assert all("drawn (16, 24, 64)" in text for text in runs_of.printed_by_two(SAMPLING))


def drawings(out):
    return {path.name: np.asarray(Image.open(path), np.int32) for path in (out / "samples").glob("*.png")}


def test_one_process_goes_on_where_sigterm_to_one_of_two_saved(data, uninterrupted, tmp_path):
    """A run that starts on two processes and resumes on one equals a run on one process."""
    out = tmp_path / "run"
    both = start_several(2, data, out, "transformer.checkpoint.every=1000", *runs_of.DRAWN)
    both[0].wait_until(lambda: max(logged(out), default=0) >= 2)
    for _ in range(2):  # the second must not break what the first began
        both[1].signal(signal.SIGTERM)
    done = [process.done() for process in both]
    assert [status for status, _ in done] == [0, 0], "\n".join(text[-3000:] for _, text in done)
    assert "SIGTERM: saved step" in done[0].text and "step 0: validation_loss" in done[0].text
    foreign = ("[Gloo]", "libtpu", "persistent compilation cache")
    printed = [line for line in done[1].text.splitlines() if not any(words in line for words in foreign)]
    assert not any("SIGTERM" in line or "step" in line or "loss" in line for line in printed), printed
    (saved,) = files.steps(out / "checkpoints")
    assert 2 <= saved < STEPS and max(logged(out)) == saved
    runs_of.run(data, out, *runs_of.DRAWN)
    assert sorted(logged(out)) == list(range(1, STEPS + 1))
    runs_of.assert_close(out, uninterrupted)
    drawn, expected = drawings(out), drawings(uninterrupted)
    assert drawn.keys() == expected.keys() == {f"64-{kind}-{step}.png" for kind in (0, 1) for step in (0, 8, 12)}
    assert all(abs(drawn[name] - expected[name]).max() <= 1 for name in drawn)


def test_four_processes_go_on_from_one_and_two_from_four(data, uninterrupted, tmp_path):
    """Two processes pass over the last checkpoint together, although only one of them finds it damaged."""
    out = begun_from(tmp_path / "run", uninterrupted, EVERY)
    runs_of.run_several(4, data, out, f"transformer.train.steps={2 * EVERY}")
    runs_of.assert_close(out, uninterrupted, 2 * EVERY)
    last = out / "checkpoints" / str(STEPS)
    shutil.copytree(uninterrupted / "checkpoints" / str(STEPS), last)
    named = [name for name in files.files(last) if not name.startswith("checksums-")]
    overwrite(next(last / name for name in named[1::2] if name.endswith("/_METADATA")))
    printed = runs_of.run_several(2, data, out)
    assert f"checkpoint {STEPS} is damaged" in printed[0] and f"resuming from step {2 * EVERY}" in printed[0]
    assert sorted(logged(out)) == list(range(EVERY + 1, STEPS + 1))
    runs_of.assert_close(out, uninterrupted)


def test_what_goes_wrong_in_one_process_ends_both_with_the_state_saved(data, uninterrupted, tmp_path):
    """First only one process cannot read its data, then both refuse a config."""
    out = begun_from(tmp_path / "run", uninterrupted, 2 * EVERY)
    blind = tmp_path / "blind"
    shutil.copytree(data, blind)
    shard = blind / "samples" / "64-0" / "unit-00002.arrayrecord"
    longer = ("transformer.train.steps=100", "transformer.checkpoint.every=1000")
    both = start_several(2, [data, blind], out, *longer)
    both[0].wait_until(lambda: logged(out))
    with shard.open("r+b") as file:
        file.truncate(0)
    shard.unlink()
    for process in both:
        status, text = process.done()
        assert status == 1 and "Traceback" not in text and str(shard) in text, text[-3000:]
    assert max(files.steps(out / "checkpoints")) == max(logged(out)) < 100

    for process in start_several(2, data, out, "transformer.optimizer.lr=0.5"):
        status, text = process.done()
        assert status == 1 and "Traceback" not in text and "optimizer.lr: 0.004 -> 0.5" in text, text[-3000:]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_gone_or_hangs_ends_the_other(fault, data, uninterrupted, tmp_path):
    out = begun_from(tmp_path / "run", uninterrupted, EVERY)
    more = ("transformer.train.steps=100", "transformer.train.watchdog_seconds=15")
    both = start_several(2, data, out, *more)
    try:
        both[0].wait_until(lambda: logged(out))
        both[1].signal(fault)
        if fault == signal.SIGSTOP:  # meanwhile nobody else may work in the folder
            for process in start_several(2, data, out):
                status, text = process.done()
                assert status == 1 and f"process {both[0].process.pid} of" in text, text[-3000:]
                assert "Traceback" not in text
        status, text = both[0].done(120)
    finally:
        both[1].signal(signal.SIGKILL)
        both[1].done()
    assert status != 0, text
    if fault == signal.SIGSTOP:
        assert status == watchdog.STATUS and "no progress for 15 s in 'step" in text, text[-3000:]
        assert (out / "stacks-0.txt").exists()
    assert "Traceback" not in text, text[-3000:]


def test_slurm_names_the_processes(data, uninterrupted, tmp_path, monkeypatch):
    out = begun_from(tmp_path / "run", uninterrupted, STEPS)
    meeting = f"127.0.0.1:{runs_of.free_port()}"
    names = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    both = []
    for process in range(2):
        for name, value in {**names, "SLURM_PROCID": f"{process}", "SLURM_LOCALID": f"{process}"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", meeting)
        both.append(runs_of.start(data, out, "--distributed", "--processes=2"))
    assert [process.done().status for process in both] == [0, 0], both[0].printed()[-3000:]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--processes=2",), "--process and --coordinator is missing"),
        (("--processes=2", "--process=2", "--coordinator=x:1"), "--process is 2; with --processes 2"),
        (("--processes=3", "--process=0", "--coordinator=x:1"), "3 processes cannot share the 8 devices"),
        (("--distributed",), "--distributed needs --processes N too"),
    ],
)
def test_processes_that_cannot_be_are_refused(more, message, data, tmp_path):
    done = runs_of.start(data, tmp_path / "run", *more).done()
    assert done.status == 1 and message in done.text and "Traceback" not in done.text, done.text
