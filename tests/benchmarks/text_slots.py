"""What padding of texts costs: arithmetic per image of the curriculum's batches against samples of exact lengths.

    python -m tests.benchmarks.text_slots [--samples N] [--layouts 1 4 8]

Writes caches of samples without real content, with captions of log-normal length (median 120 tokens, sigma 0.8, at most
1,024, and 40 of template), for pairs and for edits with one condition image. The loader draws an epoch with the config
of the stage that adds the resolution, in smaller batches of as many microbatches. The figures are the
model FLOPs of the layouts that the loader chose, divided by those of the same samples without padding.
"""

import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.loading.loader import Loader
from data_pipeline.loading.mixture import Mixture, Shares
from data_pipeline.loading.text_slots import TextSlots
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.models.flops import flops_per_step
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.planning.captions import AROUND, TEMPLATE, Captions
from qi2_jax.sequence import Layout
from qi2_jax.workflows.config import load_experiment
from tests.caches import write_cache

STAGES = {256: "s2_256p_edits", 512: "s3_512p_synthetic", 1024: "s4_1024p", 2048: "s5_2048p"}
MICROBATCH = 32  # rows; of the stages 512 to 8,192


def write(folder: Path, side: int, samples: int) -> Cache:
    """Pairs and edits whose latents have one channel and whose features have one value."""
    latents = np.zeros((side // 16, side // 16, 1), np.float16)

    def text(caption: int, conditions: int) -> Text:
        lengths = (*(AROUND,) * conditions, TEMPLATE + caption)
        return Text(np.zeros((sum(lengths), 1), np.float16), lengths)

    made = [
        (side, Sample(latents, (text(caption, count),), (latents,) * count, text(1, count) if count else None))
        for count in (0, 1)
        for caption in Captions().drawn(samples, side + count)
    ]
    write_cache(folder, made, text(1, 0), {})
    return Cache(folder)


def cost(model: MMDiTConfig, layout: Layout, images: int) -> float:
    return flops_per_step(model, layout, images).model


def overhead(model: MMDiTConfig, loader: Loader) -> tuple[float, float]:
    """Operations of an epoch, as a multiple of those of exact lengths; and that of the text slots alone."""
    rows = loader.window * loader.microbatches * loader.size
    computed = exact = slots = tokens = 0.0
    for window in range(max(1, len(loader.samples) // rows)):
        drawn = loader.draw(window)
        computed += sum(cost(model, layout, loader.size) for layout in drawn.layouts)
        slots += sum(loader.size * sum(layout.text) for layout in drawn.layouts)
        flat = (part.reshape(-1) for part in (drawn.samples, drawn.texts, drawn.dropped))
        lengths, counts = np.unique(loader.lengths.drawn(*flat, loader.empty.lengths), axis=0, return_counts=True)
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            exact += cost(model, dataclasses.replace(loader.layout, text=tuple(length)), count)
        tokens += float((lengths.sum(axis=1) * counts).sum())
    return computed / exact, slots / tokens


def check(loader: Loader) -> None:
    """Reads microbatches as training does, and compares them with what was drawn."""
    drawn, batches = loader.draw(0), loader.batches()
    for place in np.linspace(0, len(drawn.layouts) - 1, 4).astype(int).tolist():
        read = batches[place]
        tokens = loader.lengths.drawn(
            drawn.samples[place], drawn.texts[place], drawn.dropped[place], loader.empty.lengths
        )
        images = loader.layout.target + sum(loader.layout.conditions)
        assert read.layout == drawn.layouts[place] and read.batch.cond.valid_BS.shape[1] == read.layout.length
        np.testing.assert_array_equal(read.batch.cond.valid_BS.sum(axis=1), tokens.sum(axis=1) + images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16_384, help="samples of each stream")
    parser.add_argument("--layouts", type=int, nargs="+", default=[1, 4, 8], help="largest numbers of layouts")
    arguments = parser.parse_args()
    table = Table("stream", *(f"at most {most}" for most in arguments.layouts), "layouts", "text slots of the last")
    for side, stage in STAGES.items():
        config = load_experiment(f"experiments/qwen_image_2/{stage}.py")
        transformer, tasks = config.transformer, tuple(config.data.mixture.tasks)
        with tempfile.TemporaryDirectory() as folder:
            cache = write(Path(folder) / "samples", side, arguments.samples)
            shares = Shares((side,), (1,), tasks, (1,))
            microbatches = {256: 4, 512: 8, 1024: 16, 2048: 16}[side]
            make = functools.partial(
                Mixture.of_cache, cache, shares, [(microbatches, MICROBATCH)], seed=0, dropout=transformer.dropout
            )
            found = []
            for most in arguments.layouts:
                slots = TextSlots(most, transformer.text_slots.window, transformer.text_slots.pieces)
                found.append([stream.loader for stream in make(local_rows=range, slots=slots).streams])
            for loaders in zip(*found, strict=True):
                check(loaders[-1])
                ratios = [f"{overhead(transformer.model, loader)[0]:.3f}" for loader in loaders]
                ends = ", ".join(str(layout.text[-1]) for layout in loaders[-1].layouts)
                conditions = len(loaders[-1].layout.conditions)
                name = f"{side}p, {'edits' if conditions else 'pairs'}"
                table.add_row(name, *ratios, str(len(loaders[-1].layouts)), ends)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
