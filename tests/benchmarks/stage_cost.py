"""What each stage of the curriculum costs on the mesh of its config, by formula; and whether its programs fit.

    python -m tests.benchmarks.stage_cost              # seconds of an update at 40% utilisation, days of a stage
    python -m tests.benchmarks.stage_cost --compile    # also memory of a chip on that mesh, with the most condition
                                                       # images at every area: minutes each
    python -m tests.benchmarks.stage_cost --compile s1_256p_t2i    # of some stages only

Captions have the lengths of `tests.benchmarks.text_slots`, at most 1,064 tokens with the template, and each is padded
to the smallest layout of its stream in which it fits (`transformer.text_slots`); memory is that of the largest layout.
Model FLOPs are those of `qi2_jax.models.flops`, padding included, without what remat computes again. 40% is what good
JAX trainers reach on v6e with language models; no figure for image transformers on TPU is published.
"""

import argparse
import pathlib

import numpy as np

from data_pipeline.loading.mixture import min_gain
from data_pipeline.loading.text_slots import choose_layouts, smallest
from data_pipeline.samples.cache import StreamKey
from data_pipeline.samples.lengths import TextLengths
from qi2_jax import sharding
from qi2_jax.models.flops import flops_per_step
from qi2_jax.planning.compile import GIB, compile_train_step, topology_mesh
from qi2_jax.runtime.chips import CHIPS
from qi2_jax.sequence import Layout
from qi2_jax.workflows.config import StageExperiment, load_experiment
from tests.benchmarks.text_slots import AROUND, CAPTION, EMPTY, TEMPLATE, captions

CHIP, UTILISATION = CHIPS["TPU v6 lite"], 0.4
SLICE, SLICE_CHIPS = "v6e:16x16", 256
SAMPLES = 16_384


def largest(tokens: int, conditions: int) -> Layout:
    return Layout((AROUND,) * conditions + (TEMPLATE + CAPTION,), tokens, (tokens,) * conditions)


def flops(config: StageExperiment, key: StreamKey, tokens: int, images: int) -> float:
    """Mean operations of a batch of a stream, with its layouts of text slots."""
    transformer, weights = config.transformer, config.data.shares.weights()
    drawn = np.array([(*(AROUND,) * key.conditions, TEMPLATE + caption) for caption in captions(SAMPLES, key.side)])
    empty = (*(AROUND,) * key.conditions, EMPTY)
    texts, rows = np.full(SAMPLES, 1), drawn
    if key.conditions:
        texts, rows = texts + 1, np.stack([drawn, np.broadcast_to(empty, drawn.shape)], 1).reshape(-1, len(empty))
    layouts = choose_layouts(
        largest(tokens, key.conditions),
        TextLengths(texts, rows),
        empty,
        transformer.dropout,
        transformer.text_slots.layouts,
        min_gain(weights, key),
    )
    dropped = np.random.default_rng(0).random(SAMPLES) < transformer.dropout
    used = [smallest(layouts, np.array([row])) for row in np.where(dropped[:, None], empty, drawn)]
    return float(np.mean([flops_per_step(transformer.model, layout, images).model for layout in used]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    paths = {path.stem: path for path in sorted(pathlib.Path("experiments/qwen_image_2").glob("s?_*.py"))}
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(paths)} (default: all)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.stages) - set(paths)):
        raise SystemExit(f"stages {unknown} are unknown; choose among {list(paths)}")
    for path in [paths[name] for name in arguments.stages or paths]:
        config = load_experiment(str(path))
        transformer, model = config.transformer, config.transformer.model
        weights, chips = config.data.shares.weights(), transformer.mesh.size
        tokens = {side: buckets.max_tokens for side, buckets in config.data.resolutions.areas}
        sizes = dict(zip(config.data.sides, transformer.batch_sizes, strict=True))
        seconds = sum(
            weight * flops(config, key, tokens[key.side], sizes[key.side]) / (chips * CHIP.flops * UTILISATION)
            for key, weight in weights.items()
        ) / sum(weights.values())
        days = seconds * transformer.train.steps / 86_400
        print(f"{path.stem}: {chips:,} x {CHIP.name}, {seconds:.1f} s an update on average, {days:.0f} days")
        if not arguments.compile:
            continue
        at_once = dict(zip(config.data.sides, transformer.images_per_device, strict=True))
        mesh = topology_mesh(SLICE, transformer.mesh, num_slices=chips // SLICE_CHIPS)
        conditions = max(key.conditions for key in weights)
        for side in config.data.sides:
            images = at_once[side] * sharding.num_batch_shards(mesh)
            keep = transformer.execution.keep
            report, _ = compile_train_step(model, largest(tokens[side], conditions), mesh, images=images, keep=keep)
            print(
                f"  {side}p, {conditions} condition images, {at_once[side]} images at once on {mesh.shape['tensor']} "
                f"chips: {report.memory.total / GIB:.1f} of {CHIP.hbm_bytes / GIB:.1f} GiB, compiled in "
                f"{report.compile_seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
