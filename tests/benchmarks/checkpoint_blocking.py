"""For what share of a save's time training waits for it.

    python tests/benchmarks/checkpoint_blocking.py [--mib 384] [--saves 4] [--folder DIR]

A state of that size on 8 fake CPU devices is saved while a step that reuses its memory goes on. "blocked" is for how
long `Checkpoints.save` and `save_locally` keep their caller, "total" the time until the checkpoint is committed and
hashed, and older ones are deleted. On a CPU the arrays are already in the host's memory: there the figure shows that
nothing but the copy is awaited, not how long the copy from a TPU takes.
"""

import argparse
import itertools
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.checkpoints.retention import Policy
from qi2_jax.training.step import TrainState

LEAVES, WIDTH = 12, 2048


def make_state(mib: int, mesh: jax.sharding.Mesh, spec: jax.P) -> TrainState:
    """A state of `mib` MiB in fp32: model, EMA and two moments, each of `LEAVES` matrices."""
    shape = (-(-mib * 2**18 // (4 * LEAVES * WIDTH * 8)) * 8, WIDTH)

    def init(key):
        draw = lambda index: {
            f"w{leaf}": jax.random.normal(jax.random.fold_in(key, 100 * index + leaf), shape) for leaf in range(LEAVES)
        }
        scalars = {name: jnp.int32(0) for name in TrainState._fields if name.startswith("skipped")}
        moments = {"mu": draw(2), "nu": draw(3)}
        return TrainState(step=jnp.int32(0), model=draw(0), ema=draw(1), optimizer=moments, **scalars)

    placed = jax.tree.map(
        lambda leaf: jax.NamedSharding(mesh, spec if leaf.ndim else jax.P()), jax.eval_shape(init, jax.random.key(0))
    )
    return jax.jit(init, out_shardings=placed)(jax.random.key(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=384)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", type=pathlib.Path, help="where checkpoints are written (default: a temporary one)")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    table = Table("state", "save", "blocked s", "total s", "share")
    meshes = {
        "sharded over 8 devices": (jax.make_mesh((8,), ("fsdp",)), jax.P("fsdp")),
        "over 4, replicated over 2": (jax.make_mesh((2, 4), ("data", "fsdp")), jax.P("fsdp")),
    }
    for name, (mesh, spec) in meshes.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            checkpoints = Checkpoints(f"{folder}/run/checkpoints", Policy(keep=1, local_every=1, local_folder=folder))
            checkpoints.save(make_state(1, mesh, spec))  # the first begins the run
            checkpoints.wait()
            assert checkpoints.local is not None
            state = make_state(arguments.mib, mesh, spec)
            for save, locally in itertools.product(range(1, arguments.saves + 1), (False, True)):
                state = jax.block_until_ready(step(state)._replace(step=jnp.int32(save)))
                put_away = checkpoints.save_locally if locally else checkpoints.save
                begun = time.monotonic()
                put_away(state, {"metrics": {"loss": 1.0}})
                blocked = time.monotonic() - begun
                state = step(state)  # what was saved may be overwritten at once
                checkpoints.wait()
                checkpoints.local.wait()
                total = time.monotonic() - begun
                kind = f"{save}, local" if locally else f"{save}"
                table.add_row(name, kind, f"{blocked:.3f}", f"{total:.3f}", f"{blocked / total:.1%}")
            checkpoints.close()
    Console().print(table)


if __name__ == "__main__":
    main()
