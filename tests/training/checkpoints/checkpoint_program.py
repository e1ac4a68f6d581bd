"""A program that saves and restores a small state, for tests on processes that are killed, starved or several.

python tests/training/checkpoint_program.py DIR loop|once|restore [PROCESS PROCESSES PORT]
"""

import pathlib
import sys

import jax

CPU_DEVICES = 4


def main() -> None:
    directory, action, *several = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    process, processes, port = map(int, several) if several else (0, 1, 0)
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES // processes)
    if several:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)

    import jax.numpy as jnp
    import numpy as np

    from qi2_jax.training.checkpoints.manager import Checkpoints
    from qi2_jax.training.checkpoints.retention import Policy
    from qi2_jax.training.step import TrainState

    mesh = jax.make_mesh((CPU_DEVICES,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("fsdp"), jax.P()))

    def init(step):
        tree = {"weight": step + jnp.arange(1 << 20, dtype=jnp.float32).reshape(1024, 1024)}
        scalars = {name: jnp.int32(0) for name in TrainState._fields if name.startswith("skipped")}
        return TrainState(step=jnp.int32(step), model=tree, optimizer=tree, ema=tree, **scalars)

    placed = jax.tree.map(lambda leaf: rows if leaf.ndim else everywhere, jax.eval_shape(init, 0))
    make = jax.jit(init, out_shardings=placed)
    like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), make(0), placed)

    checkpoints = Checkpoints(pathlib.Path(directory), Policy(keep=3))
    print("restoring", flush=True)
    restored = checkpoints.restore(like)
    first = 0 if restored is None else int(restored[0].step)
    print(f"restored {first}", flush=True)
    if restored is not None:
        assert restored[1]["step"] == first and restored[1]["metrics"] == {"loss": 1.0 / first}
        for shard in restored[0].model["weight"].addressable_shards:
            whole = first + np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
            assert np.array_equal(shard.data, whole[shard.index])
    for line in checkpoints.damaged:
        print(line, flush=True)
    for step in range(first + 1, first + 1 + {"loop": 10_000, "once": 1, "restore": 0}[action]):
        checkpoints.save(make(step), {"metrics": {"loss": 1.0 / step}})
        print(f"began {step}", flush=True)
    checkpoints.close()
    print("closed", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"ValueError: {error}") from error
