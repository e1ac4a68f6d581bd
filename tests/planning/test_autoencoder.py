"""The training step of a tiny autoencoder with the full loss, compiled for TPU chips that are not attached."""

import importlib.util
import pathlib

import pytest

from qi2_jax.models.dinov2 import Dinov2Config
from qi2_jax.models.lpips import LPIPSConfig
from qi2_jax.planning.autoencoder import compile_train_step
from qi2_jax.planning.compile import topology_mesh
from qi2_jax.workflows.config import load_experiment

TINY = str(pathlib.Path(__file__).parents[2] / "experiments" / "qwen_image_2" / "autoencoder.py:tiny")
SMALL = ("encoder_width=4", "decoder_width=4", "latent_channels=8", "multipliers=(1,1)", "halves_time=(True,)")
FULL_LOSS = ("perceptual.weight=1.0", "alignment.weight=0.1", "alignment.layer=2", "execution.remat_levels=1")
FEATURES = Dinov2Config(8, 2, 2, 16, "gelu", False, True, 1e-6, 4, 7, 0)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install 'qi2[tpu]'"
)
def test_step_with_the_full_loss_for_v6e():
    run = (
        "mesh.data=1",
        "mesh.fsdp=4",
        "crop=16",
        "execution.dtype=bfloat16",
        "optimizer.kind=adam",
        "optimizer.adam_lr=0.0",
        *FULL_LOSS,
    )
    overrides = [*(f"vae.model.{change}" for change in SMALL), *(f"vae.{change}" for change in run)]
    config = load_experiment(TINY, overrides).vae
    report, _ = compile_train_step(
        config, topology_mesh("v6e:2x2", config.mesh), lpips=LPIPSConfig((2, 2, 2, 2, 2)), features=FEATURES
    )
    assert (report.chip.name, report.chips, report.crops) == ("v6e", 4, 8)
    assert 0 < report.memory.total < report.chip.hbm_bytes
    batch = 2 * (16 * 16 * 4 + 3) * 4  # bytes of two crops with the values of the alignment
    assert min(report.state_bytes, report.frozen_bytes) > 0
    assert report.memory.arguments >= report.state_bytes + report.frozen_bytes + batch  # and padding
    assert 0.9 * report.memory.outputs < report.memory.aliased <= report.memory.outputs
    assert report.crop_flops > 3 * 16 * 16 * 2 * 2 * 2 * 9  # VGG16's second convolution alone, three times
    assert f"of {report.chip.hbm_bytes / 2**30:.2f} GiB" in "\n".join(report.lines())
