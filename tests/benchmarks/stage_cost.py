"""What each stage of the curriculum costs on the mesh of its config, by formula, at one utilisation for all.

    python -m tests.benchmarks.stage_cost              # seconds of an update at 40% utilisation, days of a stage

Captions have log-normal lengths (`qi2_jax.planning.captions`), and each is padded to the smallest layout of its stream
in which it fits (`transformer.text_slots`). Model FLOPs are those of `qi2_jax.models.flops`, padding included, without
what the backward pass computes again. 40% is what good JAX trainers reach on v6e with language models; no figure for
image transformers on TPU is published. `qi2 plan` compiles the programs, and says whether they fit and what binds them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pathlib

from qi2_jax.planning.captions import Captions
from qi2_jax.planning.compile import topology_mesh
from qi2_jax.planning.stage import parts_of, streams_of_stage
from qi2_jax.runtime.chips import CHIPS
from qi2_jax.workflows.config import StageExperiment, load_experiment

CHIP, UTILISATION = CHIPS["TPU v6 lite"], 0.4
SLICE, SLICE_CHIPS = "v6e:16x16", 256


def main() -> None:
    total = 0.0
    for path in sorted(pathlib.Path("experiments/qwen_image_2").glob("s?_*.py")):
        config = load_experiment(str(path))
        assert isinstance(config, StageExperiment)
        transformer, chips = config.transformer, config.transformer.mesh.size
        mesh = topology_mesh(SLICE, transformer.mesh, num_slices=chips // SLICE_CHIPS)
        flops = sum(part.flops for part in parts_of(config, mesh, streams_of_stage(config, Captions())))
        seconds = flops / (chips * CHIP.flops * UTILISATION)
        days = seconds * transformer.train.steps / 86_400
        total += days
        print(f"{path.stem}: {chips:,} x {CHIP.name}, {seconds:.1f} s an update on average, {days:.1f} days")
    print(f"all stages: {total:.1f} days")


if __name__ == "__main__":
    main()
