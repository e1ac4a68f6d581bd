"""How fast a process reads cached samples, and what its index costs in memory.

    python tests/benchmarks/loader.py [--samples 600] [--folder DIR]

Samples are those of 256p: latents of 16 x 16 x 64 in fp32 and 256 text features of 4096 in bfloat16 (2.2 MB each). The
second table holds the memory that a stream of so many samples takes: its files' names and numbers, the indices of the
files that are open, and the shuffled order of epochs.
"""

import argparse
import gc
import itertools
import pathlib
import tempfile
import time
import tracemalloc

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline import cache
from data_pipeline.cache import Cache, Largest, Stream, StreamKey
from data_pipeline.loader import Loader
from data_pipeline.mixture import Mixture, layout_of
from data_pipeline.mixture import Stream as Part
from data_pipeline.samples import Sample, Text

BATCH, TOKENS, WIDTH = 32, 256, 4096
RECORDS_PER_UNIT = 16_384


def write(folder: pathlib.Path, samples: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(TOKENS, WIDTH)).astype(ml_dtypes.bfloat16)
    latents = rng.normal(size=(16, 16, 64)).astype(np.float32)
    made = ((256, Sample(latents, (Text(features, (TOKENS,)),), record=index)) for index in range(samples))
    cache.write_cache(folder, made, Text(features[:8], (8,)), {})


def mixture(stream: Stream, empty: Text) -> Mixture:
    loader = Loader(stream, empty, layout_of(stream.largest, empty.lengths), BATCH, 0, dropout=0.1)
    return Mixture((Part(str(stream.key), loader, 1),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--folder", type=pathlib.Path, help="where the samples are written (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        write(folder, arguments.samples)
        made = Cache(folder)
        table = Table("samples", "files", "MiB of a stream and its order")
        for count in (10**6, 10**8, 10**9):
            gc.collect()
            tracemalloc.start()
            files = [
                (f"unit-{unit:05d}.arrayrecord", RECORDS_PER_UNIT) for unit in range(-(-count // RECORDS_PER_UNIT))
            ]
            stream = Stream(folder, StreamKey(256, 0), Largest(256, (TOKENS,), ()), files)
            order = mixture(stream, made.empty).streams[0].loader
            drawn = order.order()
            assert len({drawn[index] for index in range(1000)}) > 990
            # An open file keeps 8 bytes per sample.
            table.add_row(f"{count:,}", f"{len(files):,}", f"{tracemalloc.get_traced_memory()[0] / 2**20:.1f}")
            tracemalloc.stop()

        batches = mixture(made.streams[0], made.empty).from_turn(0)
        next(batches)  # the threads are running
        steps = 2 * arguments.samples // BATCH
        begun = time.monotonic()
        for _ in itertools.islice(batches, steps):
            pass
        rate = steps * BATCH / (time.monotonic() - begun)
    opened = cache.MAX_OPEN * RECORDS_PER_UNIT * 8 / 2**20
    console = Console()
    console.print(f"{rate:.0f} samples/s of one process, batches of {BATCH}")
    console.print(table)
    console.print(f"open files, at most {cache.MAX_OPEN} of {RECORDS_PER_UNIT:,} samples: {opened:.1f} MiB")


if __name__ == "__main__":
    main()
