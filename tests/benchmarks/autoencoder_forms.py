"""What decides how well a small autoencoder learns.

    python -m tests.benchmarks.autoencoder_forms RUN [STEPS] [FORM...]

RUN is a finished demo, on whose images each form trains for STEPS updates (default 300) of 8 crops of 64 pixels. The
table has the PSNR over all pixels of all images in RGB, of the EMA weights, and CPU seconds. The first row is
the linear code of the same size, fitted on these images.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.loading.crops import SelectedImages
from data_pipeline.selection.index import INDEX, read_selection
from qi2_jax.evaluation import linear_code
from qi2_jax.models import vae_blocks
from qi2_jax.models.vae import VAE
from qi2_jax.pixels import normalize
from qi2_jax.tasks.autoencoder.task import make_task
from qi2_jax.tasks.devices import make_mesh
from qi2_jax.training import loop
from qi2_jax.workflows.config import DemoExperiment, load_experiment
from qi2_jax.workflows.data import images_of

LEVELS = [
    "vae.model.patch_size=1",
    "vae.model.multipliers=(1,2,4,8,8)",
    "vae.model.halves_time=(False,False,False,False)",
    "vae.model.encoder_width=8",
    "vae.model.decoder_width=8",
    "vae.linear_start=0",
]
MUON: dict[str, Any] = dict(kind="muon", momentum=0.95, lr=0.02, adam_lr=0.001)
ADAM = ["vae.optimizer.lr=0.001"]
FORMS: dict[str, list[str]] = {
    "linear start, on patches": [],
    "random start, on patches": ["vae.linear_start=0", *ADAM],
    "five levels": [*LEVELS, *ADAM],
    "five levels, Muon": LEVELS,
    "five levels, Muon, no shortcuts": LEVELS,
    "five levels, Muon, crops anywhere": [*LEVELS, "vae.crop_step=1", "vae.mirrored=0.5"],
}


def psnr(error: float) -> float:
    """Of a mean squared error of values in [-1, 1]."""
    return float(10 * np.log10(4 / error))


def train(config: DemoExperiment, images: SelectedImages) -> VAE:
    """The EMA weights after training."""
    mesh = make_mesh(config.vae.mesh)
    task = make_task(config.vae, images, mesh, 0.0)
    with tempfile.TemporaryDirectory() as out:
        return loop.train(task, config.vae, Path(out), mesh).ema


def mean_squared_error(vae: VAE, images: SelectedImages) -> float:
    rebuild = jax.jit(lambda vae, x: vae.decode(vae.encode(x).mean))
    errors = []
    for pixels in images:
        x = jnp.asarray(normalize(pixels)[None])
        errors.append(np.square(np.asarray(rebuild(vae, x)) - x)[..., :3].ravel())
    return float(np.concatenate(errors).mean())


@contextlib.contextmanager
def without_shortcuts() -> Iterator[None]:
    """Levels that change the resolution have no shortcut; residual blocks keep theirs."""
    down, up = vae_blocks.average_down, vae_blocks.duplicate_up

    def no_down(*args: Any, **options: Any) -> Any:
        return jnp.zeros_like(down(*args, **options))

    def no_up(*args: Any, **options: Any) -> Any:
        return jnp.zeros_like(up(*args, **options))

    with mock.patch.multiple(vae_blocks, average_down=no_down, duplicate_up=no_up):
        yield


def main(run: Path, steps: int, names: list[str]) -> None:
    settings = [f"vae.train.steps={steps}", f"vae.optimizer.decay_steps={steps}", f"vae.checkpoint.every={steps}"]
    demo = load_experiment("experiments/demo.py", settings)
    assert isinstance(demo, DemoExperiment)
    records = run / "records"
    images = images_of(records, read_selection(records / INDEX), demo.data.resolutions, demo.data.channels)
    colour = [image[..., :3] for image in images]
    (code,) = linear_code.fit(colour, [(16, 64)])
    errors = [np.square((code.reconstruct(image[None])[0] - image.astype(float)) / 127.5).ravel() for image in colour]
    rows = [("linear code, fitted on these images", psnr(np.concatenate(errors).mean()), 0.0, 0)]
    for name in names or FORMS:
        config = load_experiment("experiments/demo.py", [*settings, *FORMS[name]])
        assert isinstance(config, DemoExperiment)
        if "Muon" in name:
            vae_config = dataclasses.replace(config.vae, optimizer=dataclasses.replace(config.vae.optimizer, **MUON))
            config = dataclasses.replace(config, vae=vae_config)
        begun = time.process_time()
        with without_shortcuts() if "no shortcuts" in name else contextlib.nullcontext():
            vae = train(config, images)
            seconds = time.process_time() - begun
            found = psnr(mean_squared_error(vae, images))
        rows.append((name, found, seconds, sum(leaf.size for leaf in jax.tree.leaves(vae))))
    print(f"\n{'after ' + str(steps) + ' updates':40} {'PSNR':>8} {'CPU s':>8} {'parameters':>12}")
    for name, found, seconds, parameters in rows:
        print(f"{name:40} {found:8.2f} {seconds:8.0f} {parameters:12,}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    arguments = sys.argv[1:]
    main(Path(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 300, arguments[2:])
