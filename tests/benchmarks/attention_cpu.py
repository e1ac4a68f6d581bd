"""Time of the attention kernels on this CPU, forward and with gradients, as ratios to the reference.

Run `python tests/benchmarks/attention_cpu.py`. The kernels of one shape take turns, so that other load on the machine
meets all of them; the best of several rounds counts.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import time

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.attention import attention
from qi2_jax.sequence import Layout

SHAPES = {  # batch, layout, heads, head width
    "tiny": (2, Layout((32,), 256), 2, 32),
    "demo": (2, Layout((128,), 1024), 6, 128),
    "wide": (1, Layout((256,), 4096), 4, 128),
}
ROUNDS = 4


def dot_product(q, k, v, *, visible_until, key_valid_BT, kernel):
    mask = (np.arange(k.shape[1])[None] < visible_until[:, None])[None, None] & key_valid_BT[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def programs(function, kernel, layout):
    until = layout.visible_until()
    forward = lambda q, k, v, valid: function(q, k, v, visible_until=until, key_valid_BT=valid, kernel=kernel)
    backward = jax.grad(lambda *operands: jnp.sum(forward(*operands) ** 2), (0, 1, 2))
    return jax.jit(forward), jax.jit(backward)


def main() -> None:
    for name, (batch, layout, heads, width) in SHAPES.items():
        rng = np.random.default_rng(0)
        shape = (batch, layout.length, heads, width)
        operands = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]
        valid = np.ones(shape[:2], bool)
        valid[:, layout.prefix - 8 : layout.prefix] = False
        kernels = {
            "reference": programs(attention, "reference", layout),
            "jax.nn": programs(dot_product, None, layout),
            "chunked": programs(attention, "chunked", layout),
        }
        seconds = {key: [np.inf, np.inf] for key in kernels}
        for round_ in range(ROUNDS + 1):
            for key, pair in kernels.items():
                for index, program in enumerate(pair):
                    start = time.perf_counter()
                    jax.block_until_ready(program(*operands, valid))
                    if round_:  # the first round compiles
                        seconds[key][index] = min(seconds[key][index], time.perf_counter() - start)
        print(f"{name}: {batch} x {layout.length} x {heads} x {width}, fp32")
        for key, pair in seconds.items():
            ratios = [base / value for base, value in zip(seconds["reference"], pair, strict=True)]
            print(
                f"  {key:10s} forward {pair[0] * 1e3:8.1f} ms ({ratios[0]:4.1f} x)"
                f"  gradients {pair[1] * 1e3:8.1f} ms ({ratios[1]:4.1f} x)",
                flush=True,
            )


if __name__ == "__main__":
    main()
