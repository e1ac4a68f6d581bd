"""Local checkpoints: between two persistent saves every process keeps its part of the state on its host's disk.

A crashed or preempted process then loses few steps, without the traffic of a persistent save. If a host is lost with
its disk, its parts come from processes that hold the same parts of the state. Parameters are replicated along `data`,
so one whole slice is enough. An incomplete checkpoint is passed over, and the run resumes from its persistent one.

FOLDER/NAME-ID-PLACE/process-I/STEP/parts.safetensors   each distinct part of the state on the process's devices
FOLDER/NAME-ID-PLACE/process-I/STEP/manifest.json       as in a persistent checkpoint, with checksums beside it

NAME is the name of the run's folder. ID is the content of `local_id` in it, which changes at each start that did not
resume from a local checkpoint, so that states which the run has abandoned are never restored. PLACE is a digest of the
folder's path: only the persistent checkpoints of a run survive a copy or a move. Each start writes a unique number, its
life, into the manifests, and parts of different lives are never combined.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from qi2_jax.runtime.atomic import write_atomic
from qi2_jax.runtime.processes import gather
from qi2_jax.training.checkpoints import checksums, files

KEEP = 2  # after a kill only some processes may have the newest, but all have the one before it
ID = "local_id"
_PARTS = "parts.safetensors"

_log = logging.getLogger(__name__)

Leaves = Mapping[str, Any]  # arrays, or their shapes with shardings, by name


def find(folder: pathlib.Path, run: pathlib.Path) -> pathlib.Path | None:
    """The folder of this process's local checkpoints of a run; None if the run has no local checkpoints."""
    name = gather(_name(run) if jax.process_index() == 0 else "")[0]
    return folder / name / f"process-{jax.process_index()}" if name else None


def renew(folder: pathlib.Path, run: pathlib.Path) -> pathlib.Path:
    """Gives a run a new identity, deletes this process's old local checkpoints, and returns the folder for new ones."""
    forget(folder, run)
    if jax.process_index() == 0:
        write_atomic(run / ID, secrets.token_hex(8).encode())
    found = find(folder, run)
    assert found is not None
    return found


def forget(folder: pathlib.Path, run: pathlib.Path) -> None:
    """Deletes this process's local checkpoints of a run, those of processes that no longer exist, and its identity."""
    old = find(folder, run)
    if old is not None and folder.is_absolute():
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(OSError):  # the disk fails
            for path in old.parent.glob("process-*"):
                if _number(path) >= jax.process_count():
                    shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # other processes have files there
            old.parent.rmdir()
    if jax.process_index() == 0:
        (run / ID).unlink(missing_ok=True)


def _name(run: pathlib.Path) -> str:
    """NAME-ID-PLACE, see above; empty if the run has no identity, or a full disk truncated it."""
    run = run.resolve()
    identity = (run / ID).read_text(errors="replace").strip() if (run / ID).is_file() else ""
    place = hashlib.sha256(os.fsencode(run)).hexdigest()[:8]
    return f"{run.name}-{identity}-{place}" if re.fullmatch("[0-9a-f]{16}", identity) else ""


def _number(path: pathlib.Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


class LocalCheckpoints:
    """The local checkpoints of one process. All processes make the same calls, from their main threads.

    Args:
      directory: folder of this process, see `find` and `renew`.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        with contextlib.suppress(OSError):  # a broken disk must not end the run
            files.clean(directory)
        self._life = gather(str(time.time_ns()))[0]
        self._background = concurrent.futures.ThreadPoolExecutor(1, "local-checkpoint")
        self._saving: tuple[int, concurrent.futures.Future] | None = None

    def save(self, step: int, leaves: Leaves, manifest: Mapping[str, Any]) -> None:
        """Copies this process's parts of the state off its devices, and writes them in the background.

        An earlier save is awaited first. A failed save, as on a full disk, is only logged as an error, because the
        persistent checkpoints do not depend on it.
        """
        self.wait()
        parts: dict[str, Array] = {}
        for name, leaf in leaves.items():
            for shard in leaf.addressable_shards:
                parts.setdefault(_key(name, leaf, shard.index), shard.data)
        for part in parts.values():  # all copies start before the first is waited for
            part.copy_to_host_async()
        host = {key: np.asarray(part, order="C") for key, part in parts.items()}
        record = files.plain({"step": step, "life": self._life, **manifest})
        self._saving = step, self._background.submit(self._write, step, host, record)

    def _write(self, step: int, parts: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        path = files.unfinished_path(self.directory, step)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            safetensors.numpy.save_file(parts, path / _PARTS)
            files.write_manifest(path, manifest)
            checksums.record(path)
            if (self.directory / str(step)).exists():
                files.remove(self.directory, step)
            path.rename(self.directory / str(step))
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self._remove([old for old in self._steps() if old <= step][:-KEEP])  # a failing disk may keep later ones

    def wait(self) -> None:
        """Waits for a save in progress."""
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            try:
                saving.result()
            except (OSError, safetensors.SafetensorError) as error:
                _log.error("no local checkpoint of step %d in %s: %s", step, self.directory, error)

    def close(self) -> None:
        """Waits for a save in progress."""
        self.wait()
        self._background.shutdown()

    def restore(self, like: Leaves, after: int) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Restores the newest state after step `after` that the processes can combine from parts of one life.

        Later states are deleted, because the run saves them again.

        Args:
          like: shape, dtype and `NamedSharding` of each leaf.
          after: step of the newest persistent checkpoint.

        Returns:
          The step, leaves and manifest of the state; None if there is none.
        """
        needed = {
            _key(name, leaf, index)
            for name, leaf in like.items()
            for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        }
        whole = self._whole(after, needed)
        what = hashlib.sha256("\n".join(sorted(needed)).encode()).hexdigest()
        reports = [json.loads(text) for text in gather(json.dumps({"what": what, "has": [*whole.items()]}))]
        groups = {report["what"] for report in reports}
        has = [{(step, life) for step, life in report["has"]} for report in reports]
        complete = [
            state
            for state in set().union(*has)
            if {report["what"] for report, states in zip(reports, has, strict=True) if state in states} == groups
        ]
        if not complete:
            if known := sorted({step for step, _ in set().union(*has)}):
                _log.warning("local checkpoints of steps %s lack parts of the state and are passed over", known)
            return None
        step, life = max(complete)
        # Later states that cannot be deleted have another life than those that will be saved.
        self._remove([other for other in self._steps() if other > step])
        parts = _read(self.directory / str(step)) if whole.get(step) == life else None
        lacking = [process for process, states in enumerate(has) if (step, life) not in states]
        if lacking:
            _log.warning("parts of processes %s were lost and are taken from processes that hold the same", lacking)
        leaves = {name: _leaf(name, leaf, parts, exchange=bool(lacking)) for name, leaf in like.items()}
        manifest = files.manifest(self.directory / str(step)) if parts is not None else {}
        recorded = json.loads(next(text for text in gather(json.dumps(manifest)) if text != "{}"))
        return step, leaves, {name: value for name, value in recorded.items() if name != "life"}

    def _whole(self, after: int, needed: set[str]) -> dict[int, str]:
        """{step: life} of the readable states after step `after` that have all parts this process needs."""
        found: dict[int, str] = {}
        for step in self._steps():
            path = self.directory / str(step)
            try:
                if step > after and self._holds(path, needed):
                    found[step] = str(files.manifest(path).get("life"))
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                _log.error("local checkpoint %s cannot be read and is passed over: %s", path, error)
        return found

    def _steps(self) -> list[int]:
        """Steps in the directory; empty if the disk cannot be read."""
        try:
            return files.steps(self.directory)
        except OSError as error:
            _log.error("local checkpoints in %s cannot be read: %s", self.directory, error)
            return []

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            try:
                files.remove(self.directory, step)
            except OSError as error:
                _log.error("local checkpoint %s cannot be deleted: %s", self.directory / str(step), error)

    def _holds(self, path: pathlib.Path, needed: set[str]) -> bool:
        """Whether a step is intact and has all parts that are needed now."""
        wrong = checksums.problems(path) or ([] if checksums.is_verified(path) else ["it has no checksums"])
        if not wrong:
            with safetensors.safe_open(path / _PARTS, "numpy") as parts:
                missing = sorted(needed - set(parts.keys()))
            wrong = [f"it lacks {len(missing)} parts, such as {missing[0]}"] if missing else []
        for line in wrong:
            _log.error("local checkpoint %s is passed over: %s", path, line)
        return not wrong


def _key(name: str, leaf: Any, index: Any) -> str:
    """A name for one part of a leaf, such as `model/blocks.up float32[0:32,0:128]`."""
    ranges = (part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
    return f"{name} {leaf.dtype}[{','.join(f'{start}:{stop}' for start, stop, _ in ranges)}]"


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path / _PARTS)


def _leaf(name: str, like: Any, parts: Mapping[str, np.ndarray] | None, *, exchange: bool) -> Array:
    """A leaf on its devices. With `exchange`, parts that a process lacks come from those that hold the same."""
    if not exchange:
        assert parts is not None
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: parts[_key(name, like, index)])
    mesh, spec = like.sharding.mesh, like.sharding.spec
    copies = NamedSharding(mesh, PartitionSpec(_unused(mesh, spec), *spec))
    count = math.prod(mesh.shape[axis] for axis in _unused(mesh, spec))
    bits = np.dtype(f"u{like.dtype.itemsize}")

    def available(index: Any) -> np.ndarray:
        if parts is None:
            return np.zeros((1, *like.sharding.shard_shape(like.shape)), bits)
        return parts[_key(name, like, index[1:])].view(bits)[None]

    stacked = jax.make_array_from_callback((count, *like.shape), copies, available)
    # A missing part contributes zeros, so the maximum over the bit patterns returns every part bit for bit.
    join = jax.jit(
        lambda copies: jax.lax.bitcast_convert_type(jnp.max(copies, axis=0), like.dtype), out_shardings=like.sharding
    )
    return join(stacked)


def _unused(mesh: Mesh, spec: PartitionSpec) -> tuple[str, ...]:
    """Mesh axes along which an array is replicated."""
    used = {axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part)}
    return tuple(axis for axis in mesh.axis_names if axis not in used)
