"""One training step and one 8-step sampling of the same small transformer, here and in diffusers, as ratios.

    python tests/benchmarks/mmdit_vs_pytorch.py [--repeats 5] [--threads 1]

Both sides run in fp32 on this CPU in one process, in turns and with the same number of threads, so that a busy machine
slows both alike; the ratio is between medians. With one thread, the ratio of CPU times is printed too, which excludes
the time in which other processes ran. The sampler uses the cached prefix on both sides. The process keeps freed memory,
as qi2's jobs on CPU do (`runtime/devices.py`); PyTorch gains from it as well.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from data_pipeline.loading.batch import Batch
from qi2_jax.diffusion import sampler
from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.diffusion.timesteps import LogitNormal, Shift
from qi2_jax.interop import mmdit as interop
from qi2_jax.interop import tensor_names
from qi2_jax.models import tree
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.runtime import devices
from qi2_jax.sequence import Layout, place
from qi2_jax.tasks.transformer.objective import Objective, make_loss

CONFIG = MMDiTConfig(layers=6, heads=6, head_width=64, rope_dims=(16, 24, 24), text_width=256)
BATCH, TEXT, GRID, STEPS = 2, 128, (32, 32), 8
TOKENS = GRID[0] * GRID[1]
Side = tuple[Callable[[], None], Callable[[], None]]  # a training step and a sampling


def same_models() -> tuple[MMDiT, QwenImage21Transformer2DModel]:
    """Ours and that of diffusers, with the same random weights."""
    values = {key: value for key, value in interop.to_diffusers(CONFIG).items() if key != "_class_name"}
    torch.manual_seed(0)
    theirs = QwenImage21Transformer2DModel(**values)
    like = jax.eval_shape(lambda: MMDiT(CONFIG, key=jax.random.key(0)))
    published = {name: tensor.detach().numpy().copy() for name, tensor in theirs.state_dict().items()}
    stacked = tensor_names.stack(published, tree.to_dict(like), interop.NAMES)
    return tree.from_dict(like, {name: jnp.asarray(array) for name, array in stacked.items()}), theirs


def our_side(model: MMDiT, latents: np.ndarray, text: np.ndarray, times: np.ndarray, kernel: str) -> Side:
    layout, run = Layout((TEXT,), TOKENS), Execution(kernel=kernel)
    positions, valid = place(layout, [TEXT], GRID)
    given = Conditioning(jnp.asarray(text), jnp.stack([positions] * BATCH), jnp.stack([valid] * BATCH))
    loss = make_loss(LogitNormal(), Objective(Shift(), run))
    batch = Batch(jnp.asarray(latents), given)
    gradient = jax.jit(
        jax.value_and_grad(lambda model, key: loss(model, None, layout, batch, jax.random.split(key, BATCH))[0])
    )

    def step():
        jax.block_until_ready(gradient(model, jax.random.key(1)))

    def sample():
        jax.block_until_ready(sampler.sample(model, latents, times, sampler.Prompt(layout, given), execution=run))

    return step, sample


def their_side(model: QwenImage21Transformer2DModel, latents: np.ndarray, text: np.ndarray, times: np.ndarray) -> Side:
    shapes, mask = [[(1, *GRID)]] * BATCH, torch.zeros(BATCH, TEXT + TOKENS // 4, dtype=torch.bool)
    mask[:, TEXT:] = True

    def predict(x, t, **cache):
        return model(
            hidden_states=x,
            encoder_hidden_states=torch.from_numpy(text),
            timestep=t,
            img_shapes=shapes,
            img_mask=mask,
            return_dict=False,
            **cache,
        )[0][:, -TOKENS:]

    def step():
        model.zero_grad()
        data, noise, t = torch.from_numpy(latents), torch.randn(latents.shape), torch.rand(BATCH)
        x = (1 - t[:, None, None]) * data + t[:, None, None] * noise
        ((predict(x, t) - (noise - data)) ** 2).mean().backward()

    @torch.no_grad()
    def sample():
        x, cache = torch.from_numpy(latents), QwenImage21KVCache(CONFIG.layers)
        for index in range(STEPS):
            mode = "extract" if index == 0 else "cached"
            velocity = predict(x, torch.full((BATCH,), float(times[index])), kv_cache=cache, kv_cache_mode=mode)
            x = x + float(times[index + 1] - times[index]) * velocity

    return step, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default 5)")
    parser.add_argument("--kernel", default=Execution().kernel, help="attention kernel of qi2")
    available = sorted(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", type=int, default=len(available), help="threads of each side (default: all cores of this process)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.threads <= len(available):
        parser.error(f"--threads {arguments.threads} must be between 1 and the {len(available)} cores of this process")
    os.sched_setaffinity(0, available[: arguments.threads])  # XLA starts one thread per core
    torch.set_num_threads(arguments.threads)
    devices.keep_freed_memory()
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    ours, theirs = same_models()
    rng = np.random.default_rng(0)
    text = rng.normal(size=(BATCH, TEXT, CONFIG.text_width)).astype(np.float32)
    latents = rng.normal(size=(BATCH, TOKENS, 64)).astype(np.float32)
    inputs = (latents, text, Schedule().times(STEPS, TOKENS))
    sides = {"qi2": our_side(ours, *inputs, arguments.kernel), "diffusers": their_side(theirs, *inputs)}
    print(
        f"{CONFIG.layers} blocks of width {CONFIG.width}, batch {BATCH}, {TEXT} text and {TOKENS} image tokens, fp32, "
        f"{arguments.threads} threads on each side"
    )
    clocks = {"": time.perf_counter} | ({"CPU ": time.process_time} if arguments.threads == 1 else {})
    for number, name in enumerate(("training step", "sampling")):
        for functions in sides.values():
            functions[number]()  # compile, warm up
        taken: dict[tuple[str, str], list[float]] = {(side, clock): [] for side in sides for clock in clocks}
        for _ in range(arguments.repeats):
            for side, functions in sides.items():
                begun = {clock: read() for clock, read in clocks.items()}
                functions[number]()
                for clock, read in clocks.items():
                    taken[side, clock].append(read() - begun[clock])
        for clock in clocks:
            ours_s, theirs_s = (statistics.median(taken[side, clock]) for side in sides)
            print(
                f"{name}: qi2 {ours_s:.2f} {clock}s, diffusers {theirs_s:.2f} {clock}s, ratio {ours_s / theirs_s:.2f}"
            )


if __name__ == "__main__":
    main()
