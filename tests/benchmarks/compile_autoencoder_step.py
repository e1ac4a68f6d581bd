"""Proof of scale: compiles the autoencoder's training step with the full loss for v6e on this CPU and prints its needs.

Run `python tests/benchmarks/compile_autoencoder_step.py [vae.KEY=VALUE ...]` for the experiment's crops of 256 pixels,
or with changes such as `vae.crop=2048 vae.batch_size=128`. The batch size is that of the whole slice. If a step does
not fit, the compiler's error says by how much. The compiler is told to save compile time instead of run time, which
takes 5 to 8 minutes; JAX_EXEC_TIME_OPTIMIZATION_EFFORT=0 compiles the program of a run, which takes more than 20.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")

import argparse

import jax

from qi2_jax.planning.autoencoder import compile_train_step
from qi2_jax.planning.compile import topology_mesh
from qi2_jax.workflows.config import load_experiment

EXPERIMENT, CHIPS = "experiments/qwen_image_2/autoencoder.py", 256  # chips of a slice
ONE_SLICE = ("vae.mesh.data=1", f"vae.batch_size={CHIPS}")


def main(topology: str, overrides: list[str]) -> None:
    config = load_experiment(EXPERIMENT, [*ONE_SLICE, *overrides]).vae
    print(f"{topology}, {config.mesh}, crops of {config.crop} pixels, {config.execution}", flush=True)
    try:
        report, _ = compile_train_step(config, topology_mesh(topology, config.mesh))
    except jax.errors.JaxRuntimeError as error:
        raise SystemExit(f"does not fit: {str(error)[:600]}") from None
    print(*report.lines(), sep="\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the autoencoder's training step and print what it needs.")
    parser.add_argument("--topology", default="v6e:16x16", help="generation and chips (default: v6e:16x16)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the experiment's config")
    arguments = parser.parse_args()
    main(arguments.topology, arguments.overrides)
