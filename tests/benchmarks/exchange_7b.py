"""Imports and exports a full-size transformer: peak memory, time against plain copies, and a hash of every tensor.

    python -m tests.benchmarks.exchange_7b [--dir DIR] [--rounds N] [--layers N]

Writes 7,115,124,736 random bf16 parameters in the published layout, beside a tiny autoencoder and encoder. Then, with
the files that are read first dropped from the page cache ("cold") and then just read ("warm"), it copies, imports and
exports in turn, each in a process of its own. Copies and ours are all synchronised to the disk, file by file. Needs
45 GB of disk for a while and removes everything at the end.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from qi2_jax.interop import mmdit
from qi2_jax.interop.components import COMPONENTS
from qi2_jax.interop.tensors import Writer, scan_folder
from qi2_jax.models.mmdit import MMDiTConfig

STEM = COMPONENTS["transformer"].stem
SHARD_BYTES = 5 * 10**9
CHUNK = 16 << 20
ROOT = pathlib.Path(__file__).parents[2]


def write_transformer(folder: pathlib.Path, config: MMDiTConfig) -> dict[str, str]:
    """Random weights as published, layer by layer in shards; returns {tensor name: hash}."""
    shapes = {}
    for ours, shape in COMPONENTS["transformer"].expected(config).items():
        for name in mmdit.NAMES.to_published(ours, shape):
            shapes[name] = shape[1:] if mmdit.NAMES.is_stacked(name) else shape
    order = sorted(shapes, key=lambda name: (mmdit.NAMES.to_ours(name)[1] or 0, name))
    shards: list[list[str]] = [[]]
    for name in order:
        if 2 * sum(math.prod(shapes[other]) for other in (*shards[-1], name)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    rng, hashes, places = np.random.Generator(np.random.SFC64(0)), {}, {}
    for number, names in enumerate(shards, 1):
        file = f"{STEM}-{number:05}-of-{len(shards):05}.safetensors"
        with Writer(folder / file, {name: ("BF16", shapes[name]) for name in names}) as writer:
            for name in names:
                bits = np.frombuffer(rng.bytes(2 * math.prod(shapes[name])), np.uint8)
                writer.write(name, bits)
                hashes[name], places[name] = hashlib.sha256(bits).hexdigest(), file
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(mmdit.to_diffusers(config), indent=2))
    return hashes


def read_hashes(folder: pathlib.Path) -> dict[str, str]:
    """{tensor name: hash} of a published transformer."""
    hashes = {}
    for name, stored in scan_folder(folder, STEM).items():
        digest = hashlib.sha256()
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            for start in range(0, stored.nbytes, CHUNK):
                digest.update(file.read(min(CHUNK, stored.nbytes - start)))
        hashes[name] = digest.hexdigest()
    return hashes


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copy(source: pathlib.Path, out: pathlib.Path) -> None:
    """What exchange is compared with: every file copied by the standard library and synchronised."""
    for path in files(source):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def child(action: str, source: pathlib.Path, out: pathlib.Path) -> None:
    """Does one action and prints its seconds and this process's peak memory."""
    if action == "copy":
        call = copy
    else:
        from qi2_jax.interop import folder

        call = {"import": folder.import_folder, "export": folder.export_folder}[action]
    begin = time.perf_counter()
    call(source, out)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The largest resident memory of this process; `ru_maxrss` would count what the parent had when it started us."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare_cache(folder: pathlib.Path, warm: bool) -> None:
    """Puts the files of a folder into the page cache, or takes them out of it."""
    os.sync()
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and file.read(CHUNK):
                pass


def measure(action: str, source: pathlib.Path, out: pathlib.Path, warm: bool) -> dict[str, float]:
    """One action in its own process, from a cold or warm cache: `seconds`, `bytes` (peak), `process` (with start)."""
    prepare_cache(source, warm)
    begin = time.perf_counter()
    command = [sys.executable, "-m", "tests.benchmarks.exchange_7b", "--child", action, str(source), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, check=True)
    result = json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - begin}
    print(
        f"  {'warm' if warm else 'cold'} {action:6} of {source.name:9} {result['seconds']:7.1f} s, with start "
        f"{result['process']:7.1f} s, peak {result['bytes'] / 2**30:.2f} GiB",
        flush=True,
    )
    return result


def run(work: pathlib.Path, rounds: int, layers: int) -> None:
    from tests import tiny_pipeline

    config = MMDiTConfig(layers=layers)
    parameters = sum(math.prod(shape) for shape in COMPONENTS["transformer"].expected(config).values())
    needed, free = 3.2 * 2 * parameters, shutil.disk_usage(work).free
    print(f"{parameters:,} parameters, {2 * parameters / 1e9:.1f} GB; {free / 1e9:.0f} GB free in {work}", flush=True)
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.0f} GB are needed; choose another --dir")
    published, ours, out = work / "published", work / "ours", work / "out"
    tiny_pipeline.write(published)
    shutil.rmtree(published / "transformer")
    hashes = write_transformer(published / "transformer", config)

    measure("import", published, ours, warm=False)
    ratios: dict[tuple[str, bool], list[float]] = {}
    peak = 0.0
    for warm in (False, True):
        for turn in range(rounds):
            for action, source in (("import", published), ("export", ours)):
                pair = ("copy", action) if turn % 2 == 0 else (action, "copy")
                found = {}
                for what in pair:
                    found[what] = measure(what, source, out, warm)
                    if what == "export" and turn == rounds - 1 and warm:
                        assert read_hashes(out / "transformer") == hashes, "tensors came back changed"
                        print(f"  every one of {len(hashes)} tensors came back byte for byte", flush=True)
                    shutil.rmtree(out)
                peak = max(peak, found[action]["bytes"])
                ratios.setdefault((action, warm), []).append(found[action]["seconds"] / found["copy"]["seconds"])
    print(f"peak memory {peak / 2**30:.2f} GiB")
    for (action, warm), values in ratios.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"{action}, {'warm' if warm else 'cold'}: {statistics.median(values):.2f} x a copy (each: {each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=pathlib.Path, default=ROOT.parent, help="where to make a temporary folder")
    parser.add_argument("--rounds", type=int, default=2, help="how often each measurement is repeated")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick try")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        action, source, out = arguments.child
        child(action, pathlib.Path(source), pathlib.Path(out))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the folder is removed
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="exchange_7b_") as work:
        run(pathlib.Path(work), arguments.rounds, arguments.layers)


if __name__ == "__main__":
    main()
