"""Memory of scoring, comparing and selecting, as the number of records grows.

    python tests/benchmarks/data_memory.py [--records 10000 50000 100000] [--pairs 1000000]

Every step runs in a process of its own, whose largest resident size is printed, and its rate. Pictures are tiny, so
that the rest is seen. Filters with models are left out. `--pairs`: also searches for near pairs among this number of
random fingerprints, of which every tenth is a changed copy.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="*", default=[10_000, 50_000, 100_000])
    parser.add_argument("--pairs", type=int, nargs="*", default=[])
    parser.add_argument("--step", nargs=2, metavar=("STEP", "ARGUMENT"), help="internal: one step in this process")
    arguments = parser.parse_args()
    if arguments.step:
        step, argument = arguments.step
        start = time.perf_counter()
        {"write": write, "score": score, "pairs": pairs, "select": select, "search": search}[step](argument)
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{megabytes:.0f} {time.perf_counter() - start:.1f}")
        return
    print(f"{'records':>10} {'step':>8} {'largest RSS, MB':>16} {'seconds':>9} {'records/s':>10}")
    for records in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("write", "score", "pairs", "select"):
                run(step, f"{folder}:{records}", records)
    for records in arguments.pairs:
        run("search", str(records), records)


def run(step: str, argument: str, records: int) -> None:
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, argument], capture_output=True, text=True, check=True
    )
    megabytes, seconds = map(float, done.stdout.split())
    print(f"{records:>10,} {step:>8} {megabytes:>16,.0f} {seconds:>9.1f} {records / seconds:>10,.0f}", flush=True)


def write(argument: str) -> None:
    import io

    from PIL import Image

    from data_pipeline.records.schema import Caption, Record
    from data_pipeline.records.shards import write_shards

    folder, count = argument.rsplit(":", 1)

    def records():
        for number in range(int(count)):
            rng = np.random.default_rng(number - number % 10 // 9)  # every tenth is near to the one before
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((40 + number % 3, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
            yield Record(f"{number:08d}.jpg", buffer.getvalue(), (Caption("a picture for a test"),), "benchmark")

    write_shards(folder, records(), records_per_shard=1000)


def score(argument: str) -> None:
    from data_pipeline.filters import CASCADE
    from data_pipeline.scoring import cascade

    cascade.score_pairs = lambda *_, **__: None  # a step of its own below
    plain = [filter for filter in CASCADE if not filter.optional]
    cascade.score(argument.rsplit(":", 1)[0], filters=plain, workers=1, progress=False)


def pairs(argument: str) -> None:
    from data_pipeline.scoring.pair_search import score_pairs

    score_pairs(argument.rsplit(":", 1)[0], progress=False)


def select(argument: str) -> None:
    from data_pipeline.selection.select import select
    from data_pipeline.selection.thresholds import Thresholds

    folder, count = argument.rsplit(":", 1)
    selection = select(folder, Thresholds(min_side=30, max_roughness=2.0))
    assert 0.85 < len(selection.kept) / int(count) < 0.95, selection.to_dict()


def search(argument: str) -> None:
    from data_pipeline.scoring import pair_search
    from data_pipeline.scoring.pairs import FINGERPRINT
    from data_pipeline.scoring.windows import WINDOWS

    count, rng = int(argument), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as work:
        with open(Path(work, "prints"), "wb") as file:
            hashes = np.zeros((2, count), np.uint64)
            for start in range(0, count, 10_000):
                block = np.zeros(min(10_000, count - start), FINGERPRINT)
                for row, name in zip(hashes, ("phash", "dhash"), strict=True):
                    block[name] = rng.integers(0, 1 << 63, len(block), dtype=np.uint64)
                    block[name][9::10] = block[name][8::10][: len(block[9::10])] ^ np.uint64(0b111)
                    row[start : start + len(block)] = block[name]
                file.write(block.tobytes())
        prints = np.memmap(Path(work, "prints"), FINGERPRINT, "r")
        order, ones, kinds = np.arange(count), np.ones(count, np.int64), np.zeros(count, np.uint64)
        windows = rng.integers(0, 1 << 63, (count, len(WINDOWS)), dtype=np.uint64)
        contents = pair_search.Contents(order, order, ones, kinds, *hashes, windows, prints)
        found = len(pair_search.search(contents, Path(work)))
        assert found >= count // 10, found


if __name__ == "__main__":
    main()
