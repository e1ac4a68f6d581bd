"""Ahead-of-time compilation of the autoencoder's training step for TPU chips that are not attached.

It compiles the functions with which a run trains (`training.step`, `tasks.autoencoder.objective`) with the frozen
networks of the loss, on shapes instead of arrays. No weights are read.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qi2_jax import sharding
from qi2_jax.models.dinov2 import Dinov2, Dinov2Config
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from qi2_jax.planning.compile import GIB, Memory, bytes_of, memory_of
from qi2_jax.planning.operations import operations
from qi2_jax.runtime import compiler
from qi2_jax.runtime.chips import Chip, chip_of
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig
from qi2_jax.tasks.autoencoder.networks import Networks
from qi2_jax.tasks.autoencoder.objective import Crop, Objective
from qi2_jax.tasks.autoencoder.trained_vae import make_model
from qi2_jax.training.step import Sums, abstract_state, make_optimizer, make_programs

PUBLISHED_LPIPS = LPIPSConfig()
# The published configuration of DINOv2-L, without registers.
DINOV2_LARGE = Dinov2Config(
    width=1024,
    layers=24,
    heads=16,
    hidden=4096,
    activation="gelu",
    swiglu=False,
    qkv_bias=True,
    eps=1e-6,
    grid=37,
    patch=14,
    registers=0,
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory and FLOPs of a training step of the autoencoder.

    Attributes:
      chip: kind of chip.
      chips: number of chips.
      crops: global batch size.
      memory: memory of one chip.
      state_bytes: size of parameters, optimizer and EMA on one chip, a part of the arguments.
      frozen_bytes: size of the frozen networks on one chip, a part of the arguments.
      crop_flops: operations for the loss and the gradients of one crop, with recomputation.
      update_flops: operations of the optimizer, which every chip executes for all parameters.
      compile_seconds: time of the compilation.
    """

    chip: Chip
    chips: int
    crops: int
    memory: Memory
    state_bytes: int
    frozen_bytes: int
    crop_flops: float
    update_flops: float
    compile_seconds: float

    def lines(self) -> list[str]:
        """The report as text."""
        memory, share = self.memory, self.crops / self.chips
        seconds = (share * self.crop_flops + self.update_flops) / self.chip.flops
        return [
            f"{self.chips} x {self.chip.name}, {self.crops} crops, compiled in {self.compile_seconds:.0f} s",
            f"HBM per chip {memory.total / GIB:.2f} of {self.chip.hbm_bytes / GIB:.2f} GiB: arguments "
            f"{memory.arguments / GIB:.2f} (without padding: state {self.state_bytes / GIB:.2f}, frozen networks "
            f"{self.frozen_bytes / GIB:.2f}), temporaries {memory.temporaries / GIB:.2f}, code "
            f"{memory.code / GIB:.2f}; peak {memory.peak / GIB:.2f}",
            f"FLOPs {self.crop_flops:.3e} per crop, and {self.update_flops:.3e} for the optimizer on every chip",
            f"at least {seconds:.3f} s per step, at most {share / seconds:.1f} crops per second and chip",
        ]


def compile_train_step(
    config: AutoencoderConfig,
    mesh: Mesh,
    *,
    lpips: LPIPSConfig = PUBLISHED_LPIPS,
    features: Dinov2Config = DINOV2_LARGE,
) -> tuple[Report, jax.stages.Compiled]:
    """Compiles the training step of the autoencoder, as it is before an adversarial phase, with the loss of its config.

    Args:
      config: config of the run; its folders of weights are not read.
      mesh: see `compile.topology_mesh`.
      lpips: configuration of LPIPS and VGG16.
      features: configuration of DINOv2.

    Returns:
      The report, and the compiled program with its HLO.

    Raises:
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if the step does not fit the chip.
      ValueError: for chips whose limits are unknown, or an alignment with a layer that the network does not have.
    """
    chip, optimizer = chip_of(mesh), make_optimizer(config.optimizer)
    networks = abstract_networks(config, lpips, features, mesh)

    state = abstract_state(functools.partial(make_model, config, networks.features), optimizer, mesh)
    objective = Objective.of(config, mesh)
    programs = make_programs(objective.loss, optimizer, config.ema_decay, 0, mesh, ema_ramp=config.ema_ramp)

    batch = abstract_batch(config, mesh)

    def gradient(state: Any, networks: Networks, batch: Crop) -> Sums:
        return programs.gradient(state, networks, None, batch, 0)

    start = time.perf_counter()
    compiled = programs.step.lower(state, networks, None, batch).compile(compiler.options_for(mesh.devices.flat))
    seconds = time.perf_counter() - start

    sums = jax.eval_shape(gradient, state, networks, batch)
    one_crop = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batch)
    report = Report(
        chip,
        mesh.size,
        config.batch_size,
        memory_of(compiled),
        state_bytes=bytes_of(state),
        frozen_bytes=bytes_of(networks),
        crop_flops=operations(gradient, state, networks, one_crop),
        update_flops=operations(programs.apply, state, sums),
        compile_seconds=seconds,
    )
    return report, compiled


def abstract_networks(config: AutoencoderConfig, lpips: LPIPSConfig, features: Dinov2Config, mesh: Mesh) -> Networks:
    """Shapes of the frozen networks of the loss, replicated on all devices."""

    def make() -> Networks:
        key, perceptual, alignment = jax.random.key(0), config.perceptual, config.alignment
        distance = LPIPS(lpips, key=key)
        network = Dinov2(features, key=key) if alignment.network == "dinov2" else distance
        return Networks(distance if perceptual.weight else None, network if alignment.weight else None)

    place = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), jax.eval_shape(make))


def abstract_batch(config: AutoencoderConfig, mesh: Mesh) -> Crop:
    """Shapes, dtypes and shardings of a global batch."""
    place = sharding.batch_sharding(mesh)

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32, sharding=place)

    pixels = array(config.crop, config.crop, config.model.in_channels)
    return Crop(pixels, array(3) if config.alignment.weight else None)
