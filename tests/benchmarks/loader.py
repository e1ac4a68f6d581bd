"""How large samples are, how fast a process reads them, and what its index costs in memory.

    python tests/benchmarks/loader.py [--samples 600] [--folder DIR]

Samples are those of 256p: latents of 16 x 16 x 64 in fp32 and 256 text features of 4096 in bfloat16, or what
`encode.online` stores instead: prompts of about as many tokens, and 256 x 256 pixels with alpha. The second table holds
the memory that a stream of so many samples takes: its files' names and numbers, the indices of the files that are open,
and the shuffled order of epochs.
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

from data_pipeline.loading.loader import Loader
from data_pipeline.loading.mixture import Mixture, Stream, layout_of
from data_pipeline.samples import cache
from data_pipeline.samples.cache import Cache, CachedStream, Largest, StreamKey
from data_pipeline.samples.schema import NOTHING, ONLINE, TEXT_AND_IMAGES, Sample, Text
from tests.caches import write_cache

BATCH, TOKENS, WIDTH = 32, 256, 4096
RECORDS_PER_UNIT = 16_384


def write(folder: pathlib.Path, samples: int, online: str) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(TOKENS, WIDTH)).astype(ml_dtypes.bfloat16)
    latents = rng.normal(size=(16, 16, 64)).astype(np.float32)
    prompt, pixels = None, None
    if online != NOTHING:
        features, prompt = features[:, :0], "word " * TOKENS
    if online == TEXT_AND_IMAGES:
        latents, pixels = latents[..., :0], rng.integers(0, 256, (256, 256, 4), np.uint8)
    text = Text(features, (TOKENS,), prompt)
    made = ((256, Sample(latents, (text,), record=index, target_pixels=pixels)) for index in range(samples))
    write_cache(folder, made, Text(features[:8], (8,), prompt), {"online": online})


def rate(made: Cache, samples: int) -> float:
    """Samples per second."""
    batches = mixture(made.streams[0], made.empty).from_turn(0)
    next(batches)  # the threads are running
    steps = 2 * samples // BATCH
    begun = time.monotonic()
    for _ in itertools.islice(batches, steps):
        pass
    return steps * BATCH / (time.monotonic() - begun)


def mixture(stream: CachedStream, empty: Text) -> Mixture:
    layouts = (layout_of(stream.largest, empty.lengths),)
    loader = Loader(stream, stream.lengths, empty, layouts, BATCH, 0, dropout=0.1)
    return Mixture((Stream(str(stream.key), loader, 1),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--folder", type=pathlib.Path, help="where the samples are written (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        read = Table("encode.online", "kB of a sample", f"samples/s of one process, batches of {BATCH}")
        for online in ONLINE:
            folder = pathlib.Path(name) / online
            write(folder, arguments.samples, online)
            made = Cache(folder)
            read.add_row(online, f"{made.nbytes / len(made) / 1000:,.0f}", f"{rate(made, arguments.samples):,.0f}")
        table = Table("samples", "files", "MiB of a stream and its order")
        for count in (10**6, 10**8, 10**9):
            gc.collect()
            tracemalloc.start()
            files = [
                (f"unit-{unit:05d}.arrayrecord", RECORDS_PER_UNIT) for unit in range(-(-count // RECORDS_PER_UNIT))
            ]
            stream = CachedStream(folder, StreamKey(256, 0), Largest(256, (TOKENS,), ()), files)
            order = mixture(stream, made.empty).streams[0].loader
            drawn = order.order()
            assert len({drawn[index] for index in range(1000)}) > 990
            # An open file keeps 8 bytes per sample.
            table.add_row(f"{count:,}", f"{len(files):,}", f"{tracemalloc.get_traced_memory()[0] / 2**20:.1f}")
            tracemalloc.stop()
    opened = cache.MAX_OPEN * RECORDS_PER_UNIT * 8 / 2**20
    console = Console()
    console.print(read)
    console.print(table)
    console.print(f"open files, at most {cache.MAX_OPEN} of {RECORDS_PER_UNIT:,} samples: {opened:.1f} MiB")


if __name__ == "__main__":
    main()
