"""What a run reports."""

import importlib.machinery
import io
import json
import math
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from qi2_jax.training.config import check_sinks
from qi2_jax.training.mean import Mean
from qi2_jax.training.telemetry import metrics, sinks
from tests.training import runs_of

DRAWING = metrics.Drawing(
    np.zeros((4, 4, 3), np.uint8), {"columns": ["sample"]}, {"1": np.full((9, 8, 4), 7, np.uint8)}
)


def test_values_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path):
    metrics.Metrics(tmp_path, 0).write(1, {"loss": math.nan, "gradient_norm": math.inf})
    again = metrics.Metrics(tmp_path, 1)  # writes again what it keeps
    again.write(2, {"loss": 0.5})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None, "gradient_norm": None}, {"step": 2, "loss": 0.5}]
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert math.isnan(first["loss"]) and second == {"step": 2, "loss": 0.5}


@pytest.mark.parametrize(("start", "kept"), [(0, []), (3, [1, 3, 3]), (4, [1, 3, 3])])
def test_a_resumed_run_drops_what_it_will_write_again_and_what_a_kill_left_unfinished(tmp_path, start, kept):
    before = metrics.Metrics(tmp_path, 0, sinks=())
    for step in (1, 3, 3, 5):
        before.write(step, {"loss": step})
        before.write_drawings(step, {"held-out": DRAWING})
    with before.path.open("a") as file:
        file.write('{"step": 4, "lo')
    after = metrics.Metrics(tmp_path, start, sinks=())
    assert [line["step"] for line in metrics.read(after.path)] == kept
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        f"held-out-{step}{part}" for step in kept for part in (".png", ".json", ".full")
    }
    after.write(6, {"loss": 6})
    assert [line["step"] for line in metrics.read(after.path)] == [*kept, 6]


def events_of(directory):
    """Event files in the order in which TensorBoard reads them."""
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path, monkeypatch):
    for process, (start, losses) in enumerate([(0, {1: 1.0, 2: 0.5, 3: 9.0, 4: 8.0}), (2, {3: 0.25, 4: 0.125})]):
        monkeypatch.setattr(metrics.os, "getpid", lambda process=process: process)
        written = metrics.Metrics(tmp_path, start)
        for step, loss in losses.items():
            written.write(step, {"loss": loss})
        written.close()
    points = {}
    for event in events_of(tmp_path / "tensorboard"):
        if event.session_log.status == SessionLog.START:  # TensorBoard's rule for restarts
            points = {step: value for step, value in points.items() if step < event.step}
        for value in event.summary.value:
            assert value.tag == "loss" and event.step not in points
            points[event.step] = value.simple_value
    assert points == {1: 1.0, 2: 0.5, 3: 0.25, 4: 0.125}
    assert points == {line["step"]: line["loss"] for line in metrics.read(tmp_path / "metrics.jsonl")}


def test_drawings_are_files_of_the_run_and_their_grids_in_tensorboard(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    notes = {"columns": ["sample"], "samples": [{"text": "雨后"}]}
    written = metrics.Metrics(tmp_path, 0)
    written.write_drawings(20, {"grid": metrics.Drawing(pixels, notes, DRAWING.whole), "a.b": metrics.Drawing(pixels)})
    written.close()
    samples = tmp_path / "samples"
    assert {path.name for path in samples.iterdir()} == {"grid-20.png", "grid-20.json", "grid-20.full", "a.b-20.png"}
    np.testing.assert_array_equal(np.asarray(Image.open(samples / "grid-20.png")), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(samples / "grid-20.full" / "1.png")), DRAWING.whole["1"])
    assert json.loads((samples / "grid-20.json").read_text(encoding="utf-8")) == notes
    first, second = (value for event in events_of(tmp_path / "tensorboard") for value in event.summary.value)
    assert [first.tag, second.tag] == ["samples/grid", "samples/a.b"]
    assert (first.image.width, first.image.height, first.image.colorspace) == (5, 6, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(first.image.encoded_image_string))), pixels)
    for name, whole in (("../x", "1"), ("x", "../1")):
        with pytest.raises(ValueError, match=r"'\.\./.' must consist of letters"):
            written.write_drawings(20, {name: metrics.Drawing(pixels, {}, {whole: pixels})})


def test_a_drawing_counts_when_its_grid_is_there(tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    written = metrics.Metrics(tmp_path, 0, sinks=())
    written.write_drawings(2, {"a": DRAWING})
    with monkeypatch.context() as patched:
        patched.setattr(metrics.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            written.write_drawings(4, {"a": DRAWING, "b": DRAWING})
    assert written.already_done(2) == ["sample"] and written.already_done(4) == []
    resumed = metrics.Metrics(tmp_path, 4, sinks=())
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"a-2.png", "a-2.json", "a-2.full"}
    resumed.write_drawings(4, {"a": DRAWING})
    assert resumed.already_done(4) == ["sample"]


class FakeRun:
    """Keeps what it is given, as W&B does: steps may not go back."""

    def __init__(self, **settings):
        self.settings, self.history, self.finished = settings, {}, False

    def log(self, values, step):
        if step >= max(self.history, default=0):
            self.history.setdefault(step, {}).update(values)

    def finish(self):
        self.finished = True


def test_weights_and_biases_continues_one_run(tmp_path, monkeypatch):
    runs = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb/__init__.py")
    fake.init = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]
    fake.Image = lambda path: Image.open(path).size
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 2, 0):
        written = metrics.Metrics(tmp_path / "cats", start, ("wandb",), {"seed": 3})
        written.write(start + 1, {"loss": 0.5})
        written.write_drawings(start + 1, {"grid": metrics.Drawing(np.zeros((2, 3, 3), np.uint8))})
        written.close()
    first, second, fresh = runs
    assert first.history == {1: {"loss": 0.5, "samples/grid": (3, 2)}} and first.finished
    assert first.settings["id"] == second.settings["id"] != fresh.settings["id"]
    assert second.settings["name"] == "cats" and second.settings["config"] == {"seed": 3}
    assert not (tmp_path / "cats" / "tensorboard").exists()


def test_sinks_that_cannot_be_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\['mlflow'\] are unknown; choose from \['tensorboard', 'wandb'\]"):
        metrics.Metrics(tmp_path, 0, ("mlflow",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'qi2\[wandb\]', or leave it out"):
        check_sinks(("wandb",))


def test_fetch_averages_steps():
    steps = [
        {"loss": jnp.float32(1), "skipped_total": 1, "loss_t/03": Mean(jnp.float32(6), 2)},
        {"loss": jnp.float32(math.nan), "loss_t/03": Mean(math.nan, 5)},
        {"loss": np.float32(3), "loss_t/03": Mean(3.0, jnp.int32(1))},
        {"loss_t/04": Mean(0.0, 0), "row_count": 7, "skipped_total": jnp.int32(2)},
    ]
    expected = {"loss": 2.0, "loss_t/03": 3.0, "row_count": 7.0, "skipped_total": 2.0}
    assert metrics.fetch(steps) == expected
    assert math.isnan(metrics.fetch([{"loss": jnp.float32(math.inf)}, {"loss": math.nan}])["loss"])
    assert metrics.fetch([]) == {}


def test_fetch_moves_everything_at_once(monkeypatch):
    calls = []
    get = metrics.jax.device_get
    monkeypatch.setattr(metrics.jax, "device_get", lambda tree: calls.append(1) or get(tree))
    assert metrics.fetch([{"loss": jnp.float32(step)} for step in range(100)]) == {"loss": 49.5}
    assert len(calls) == 1


PROGRAM = """
import pathlib, sys
import jax
process, port, run = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from qi2_jax.training.telemetry import accounting, metrics

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rows = jax.make_array_from_callback((8,), NamedSharding(mesh, PartitionSpec("data")), lambda at: np.arange(8.0)[at])
mean = jax.jit(jnp.mean, out_shardings=NamedSharding(mesh, PartitionSpec()))
values = metrics.fetch([{"loss": mean(rows + step)} for step in range(3)])
assert values == {"loss": 4.5}, values
written, events = metrics.Metrics(run, 0), accounting.Events(run)
written.write(3, values)
written.write_drawings(3, {"grid": metrics.Drawing(np.zeros((2, 2, 3), np.uint8))})
written.close()
events.write("start", 0)
print("fetched", process)
"""


def test_replicated_metrics_of_two_processes_are_fetched_by_both_and_written_by_one(tmp_path):
    for process, printed in enumerate(runs_of.printed_by_two(PROGRAM, tmp_path / "run")):
        assert f"fetched {process}" in printed
    assert metrics.read(tmp_path / "run" / "metrics.jsonl") == [{"step": 3, "loss": 4.5}]
    assert len((tmp_path / "run" / "events.jsonl").read_text().splitlines()) == 1
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 1


FULL = """
import pathlib, resource, sys
import numpy as np
from qi2_jax.training.telemetry import metrics

directory = pathlib.Path(sys.argv[1])
written = metrics.Metrics(directory, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sink = written if sys.argv[2] == "file" else written._sinks[0]
try:
    for step in range(300):
        if sys.argv[2] == "file":
            written.write(step, {})
            written.path.write_text("x" * 4096)
        else:
            sink.scalars(step, {f"a{name}": 1.0 for name in range(200)})
except OSError as error:
    print("raised", error)
written.close()
print("closed")
"""


@pytest.mark.parametrize(("what", "named"), [("file", metrics.FILE), ("tensorboard", sinks.TENSORBOARD)])
def test_a_file_that_cannot_grow_is_an_error_and_never_a_wait(what, named, tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "run"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    raised, closed = done.stdout.splitlines()
    assert raised.startswith("raised [Errno 27]") and str(tmp_path / "run" / named) in raised and closed == "closed"
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_tensorboard_gets_no_points_that_are_not_finite(tmp_path, caplog):
    written = metrics.Metrics(tmp_path, 0)
    written.write(1, {"loss": math.nan, "mfu": 0.5, "gradient_norm": math.inf})
    written.close()
    tags = [value.tag for event in events_of(tmp_path / "tensorboard") for value in event.summary.value]
    assert tags == ["mfu"] and not caplog.records


def test_foreign_lines_and_unfinished_drawings_do_not_stop_a_resume(tmp_path):
    before = metrics.Metrics(tmp_path, 0, sinks=())
    before.write(1, {"loss": 1})
    with before.path.open("a") as file:
        file.write('[]\n{"step": "x"}\n{"step": 1, "note": "by hand"}\n5\n')
    before.write(2, {"loss": 2})
    before.write(3, {"loss": 3})
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid-2.partial").write_bytes(b"PNG")
    after = metrics.Metrics(tmp_path, 2, sinks=())
    assert metrics.read(after.path) == [{"step": 1, "loss": 1}, {"step": 1}, {"step": 2, "loss": 2}]
    assert [*(tmp_path / "samples").iterdir()] == []


def test_of_a_counter_of_skipped_steps_the_highest_value_counts():
    assert metrics.fetch([{"skipped": jnp.int32(n)} for n in (1, 2, 3, 0, 1)]) == {"skipped": 3}
