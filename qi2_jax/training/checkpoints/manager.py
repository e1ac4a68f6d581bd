"""Checkpoints of a run: atomic, asynchronous, verified by checksums, as plain named leaves.

`DIR/<step>/` has four items: `model`, `ema` and `optimizer`, each a flat dict of named leaves, and `progress` with the
scalars of the state. Beside them are `manifest.json` and checksums. All processes see the same DIR. Only this file and
`contents.py`, which reads parts of a checkpoint, use Orbax.
"""

import concurrent.futures
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from qi2_jax.models import tree
from qi2_jax.runtime.processes import gather
from qi2_jax.training.checkpoints import checksums, files, local, retention
from qi2_jax.training.checkpoints.contents import check, contents, describe
from qi2_jax.training.checkpoints.local import LocalCheckpoints
from qi2_jax.training.checkpoints.retention import Policy
from qi2_jax.training.step import TrainState

ITEMS = ("model", "ema", "optimizer", "progress")
_PATIENCE = 300.0  # seconds that process 0 waits for the checksums of the others before it deletes anything

_log = logging.getLogger(__name__)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Shortens Orbax's log: several threads log the traceback of a failed save before it is raised here."""
    if "/orbax/" not in record.pathname or not record.exc_info:
        return True
    record.exc_info = None
    return "_SignalingThread.run() raised" not in record.getMessage()


logging.getLogger("absl").addFilter(_in_one_line)


def _without_late_writes(show: Callable[[Any], object]) -> Callable[[Any], object]:
    """Wraps `sys.unraisablehook`: after one write of a save has failed, Orbax closes the event loop of all of them.

    TensorStore prints a traceback for each write that ends later. The error of the save names the cause.
    """

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            _log.debug("a write ended after its save had failed")
        else:
            show(unraisable)

    return hook


sys.unraisablehook = _without_late_writes(sys.unraisablehook)


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    trees = {name: tree.to_dict(getattr(state, name)) for name in ITEMS if name in state._fields}
    return trees | {"progress": {name: getattr(state, name) for name in state._fields if name not in trees}}


def _saving() -> ocp.Context:
    """Orbax's options for a save, as a context manager."""
    context = ocp.Context()
    if jax.default_backend() == "cpu":
        # Replicas share the writing by slicing their arrays on the device. On a CPU the caller would wait for copies
        # that are not needed otherwise: JAX copies by itself if a step reuses the memory.
        context.array.saving.use_replica_parallel = False
    return context


def _reason(error: BaseException) -> str:
    """The message of an error, without TensorStore's list of source lines."""
    return " ".join(str(error).split("[source locations=")[0].split()) or type(error).__name__


def _leaves(state: TrainState) -> dict[str, Any]:
    return {f"{item}/{name}": leaf for item, leaves in _items(state).items() for name, leaf in leaves.items()}


def _state(like: TrainState, leaves: Mapping[str, Any]) -> TrainState:
    """The inverse of `_leaves`."""
    items: dict[str, dict[str, Any]] = {item: {} for item in ITEMS}
    for name, leaf in leaves.items():
        item, _, name = name.partition("/")
        items[item][name] = leaf
    trees = {name: tree.from_dict(getattr(like, name), items[name]) for name in ITEMS if name in like._fields}
    return like._replace(**trees, **items["progress"])


class Checkpoints:
    """The checkpoints of one run. All processes of a program make the same calls, from their main threads.

    Attributes:
      directory: folder of the checkpoints.
      policy: rules for retention, checksums and local checkpoints.
      damaged: a line for each checkpoint that `restore` passed over, with what is wrong.
      local: local checkpoints, after `restore` or `begin_locally`; None if the policy has none.
      on_commit: callback with the step of each persistent checkpoint that is complete, in process 0 and in the thread
        that saves.
    """

    def __init__(self, directory: pathlib.Path | str, policy: Policy = Policy()):  # noqa: B008
        self.directory = pathlib.Path(directory).resolve()
        self.policy = policy
        self.damaged: list[str] = []
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in files.clean(self.directory):
                _log.info("removed %s: a killed process left it unfinished", self.directory / name)
        self._newest = max(self._steps(), default=None)
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self.local: LocalCheckpoints | None = None
        self.on_commit: Callable[[int], None] = lambda step: None

    def latest(self) -> int | None:
        """The newest complete step, intact or damaged, or None. Local and unfinished checkpoints do not count."""
        return self._newest

    def save(self, state: TrainState, manifest: Mapping[str, Any] | None = None) -> None:
        """Copies the state off the devices and saves it in the background, after an earlier save is complete.

        The background thread writes and commits the arrays, then the manifest and checksums, then deletes what the
        policy does not keep. The step of the newest checkpoint is not saved again.

        Args:
          state: training state, whose `step` names the checkpoint.
          manifest: plain JSON; the policy's `best_metric` refers to its `metrics`.

        Raises:
          ValueError: if this save cannot begin or an earlier one failed, as on a full disk, naming the directory.
        """
        step = int(state.step)
        self.wait()
        if step != self._newest:
            record = files.plain({"step": step, **(manifest or {})})
            path = self.directory / str(step)
            try:
                with _saving():
                    written = ocp.save_checkpointables_async(path, _items(state), custom_metadata=record)
            except Exception as error:
                raise self._failed(step, error) from error
            self._saving = step, self._background.submit(self._finish, written, path, record)

    def begin_locally(self) -> None:
        """Prepares `save_locally`, if the policy has local checkpoints.

        Deletes earlier local checkpoints, unless `restore` continued from them.
        """
        place = pathlib.Path(self.policy.local_folder), self.directory.parent
        if not self.policy.local_every:
            local.forget(*place)
        elif self.local is None:
            self.local = LocalCheckpoints(local.renew(*place))

    def end_locally(self) -> None:
        """Deletes the local checkpoints of a run that has ended."""
        if self.local is not None:
            self.local.wait()
            local.forget(pathlib.Path(self.policy.local_folder), self.directory.parent)

    def save_locally(self, state: TrainState, manifest: Mapping[str, Any] | None = None) -> None:
        """Copies this process's part of the state to its host's disk, see `local.py`.

        The first save of a run is a persistent one instead, which proves that the run has begun.
        """
        assert self.local is not None
        if self._newest is None:
            self.wait()
        if self._newest is None:
            self.save(state, manifest)
        else:
            self.local.save(int(state.step), _leaves(state), manifest or {})

    def _finish(self, written: Any, path: pathlib.Path, manifest: dict[str, Any]) -> None:
        """Completes a save, in the background thread."""
        written.result()  # all processes have committed
        process, processes = jax.process_index(), jax.process_count()
        if process == 0:
            files.write_manifest(path, manifest)
            self.on_commit(manifest["step"])
        if self.policy.checksums:
            checksums.record(path, process, processes)
        if process == 0:
            end = time.monotonic() + _PATIENCE
            while self.policy.checksums and not checksums.is_recorded(path, processes) and time.monotonic() < end:
                time.sleep(0.05)
            retention.apply(self.directory, self.policy)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest intact checkpoint, which may be a local one.

        A checkpoint whose files differ from their checksums, or that cannot be read, is passed over. This is logged as
        an error and added to `damaged`, and the checkpoint is renamed to `STEP.damaged` once an older one is restored.
        Counters that an older version did not save start at zero.

        Args:
          like: abstract state with the shapes, dtypes and shardings to restore.

        Returns:
          The state and its manifest ({} for checkpoints of older versions), or None if there is no checkpoint.

        Raises:
          ValueError: naming every leaf that is missing, unexpected, or of another shape or dtype; or if there are
            checkpoints, but none is intact.
        """
        self.wait()
        if self.policy.local_every and self._newest is not None:
            place = local.find(pathlib.Path(self.policy.local_folder), self.directory.parent)
            kept = None if place is None else LocalCheckpoints(place)
            found = None if kept is None else kept.restore(_leaves(like), self._newest)
            if kept is not None and found is not None:
                step, leaves, manifest = found
                _log.warning("resuming from the local checkpoint of step %d in %s", step, kept.directory)
                self.local = kept
                return _state(like, leaves), manifest
        damaged: dict[int, list[str]] = {}
        for step in sorted(self._steps(), reverse=True):
            path = self.directory / str(step)
            state, wrong = self._attempt(path, like)
            if state is not None:
                break
            damaged[step] = [f"{path}: {line}" for line in wrong]
        else:
            if not damaged:
                return None
            problems = "\n  ".join(line for lines in damaged.values() for line in lines)
            raise ValueError(
                f"no checkpoint in {self.directory} is intact. Restore one from a backup, or start again in another "
                f"folder. Problems:\n  {problems}"
            )
        for other, lines in damaged.items():
            aside = files.set_aside(self.directory, other).name if jax.process_index() == 0 else ""
            self.damaged.append(f"checkpoint {other} is damaged, now {gather(aside)[0]}: {'; '.join(lines)}")
            _log.error("%s; resuming from step %d", self.damaged[-1], step)
        if self.policy.checksums and not checksums.is_verified(path):
            _log.warning("checkpoint %s is unverified: its checksums are incomplete", path)
        self._newest = step
        return state, files.manifest(path)

    def close(self) -> None:
        """Waits for a save in progress.

        Raises:
          ValueError: if it failed, naming the directory.
        """
        try:
            if self.local is not None:
                self.local.close()
            self.wait()
        finally:
            self._background.shutdown()

    def _steps(self) -> list[int]:
        """Complete steps as process 0 sees them."""
        seen = files.steps(self.directory) if jax.process_index() == 0 else []
        return [int(step) for step in gather(" ".join(map(str, seen)))[0].split()]

    def wait(self) -> None:
        """Waits for a save in progress. Raises as `close`."""
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            try:
                saving.result()
            except Exception as error:
                raise self._failed(step, error) from error
            self._newest = step

    def _failed(self, step: int, error: Exception) -> ValueError:
        """The error of a failed save. What the save wrote is removed where possible."""
        if jax.process_index() == 0:
            for path in files.unfinished(self.directory, step):
                shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(self.directory).free / 2**30
        return ValueError(
            f"saving step {step} in {self.directory} failed: {_reason(error)}. {free:.3f} GiB are free there. Earlier "
            f"checkpoints {files.steps(self.directory)} are intact: fix the cause and run the same command to resume"
        )

    def _is_intact(self, path: pathlib.Path) -> bool:
        """Whether the files are known to be those that were saved, so that an error has another cause."""
        return self.policy.checksums and checksums.is_verified(path)

    def _attempt(self, path: pathlib.Path, like: TrainState) -> tuple[TrainState | None, list[str]]:
        """The state of a step, or None and its problems; the same in all processes."""
        wrong: list[str] = []
        if self.policy.checksums:
            wrong = checksums.problems(path, jax.process_index(), jax.process_count())
        # All processes know the problems before anything is read, as one may have compared what another reads.
        if wrong := _agreed(wrong) or _agreed(self._unreadable(path)):
            return None, wrong
        wanted = _items(like)
        known = describe(path, "progress")
        added = {name: leaf for name, leaf in wanted["progress"].items() if name not in known and name != "step"}
        wanted["progress"] = {name: leaf for name, leaf in wanted["progress"].items() if name not in added}
        check(path, wanted)
        try:
            loaded: dict[str, Any] = ocp.load_checkpointables(path, wanted)
        except Exception as error:
            if self._is_intact(path):
                raise
            wrong = [_reason(error)]
        if wrong := _agreed(wrong):
            return None, wrong
        zeros = {name: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in added.items()}
        loaded["progress"] |= zeros
        return _state(like, {f"{item}/{name}": leaf for item in ITEMS for name, leaf in loaded[item].items()}), []

    def _unreadable(self, path: pathlib.Path) -> list[str]:
        """Problems with the descriptions of a step's items, which are read before its arrays.

        Errors are raised if the files are known to be those that were saved.
        """
        try:
            files.manifest(path)
            found = contents(path)
        except Exception as error:  # Orbax raises many types for damaged files
            if self._is_intact(path):
                raise
            return [_reason(error)]
        return [f"{item} is missing" for item in ITEMS if item not in found]


def _agreed(lines: list[str]) -> list[str]:
    """The lines of all processes together."""
    return sorted({line for text in gather("\n".join(lines)) for line in text.splitlines()})
