"""Finds how a stage runs best on a topology: mesh, microbatch and what the backward pass keeps.

Candidates are ranked by formula, and the best ones are compiled: only the compiler knows whether a program fits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from data_pipeline.samples.cache import Cache
from qi2_jax.models.flops import flops_per_step
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.models.recomputation import WORKING
from qi2_jax.planning.captions import Captions
from qi2_jax.planning.compile import GIB, Trainer, memory_of, topology_devices
from qi2_jax.planning.programs import bandwidth
from qi2_jax.planning.stage import (
    Part,
    StagePlan,
    Stream,
    activation_bytes,
    binding_parts,
    parts_of,
    plan_stage,
    streams_of_stage,
)
from qi2_jax.runtime.chips import CHIPS, chip_of
from qi2_jax.sharding import MeshShape, make_mesh, num_batch_shards
from qi2_jax.tasks.transformer.config import FIT, StageConfig
from qi2_jax.tasks.transformer.execution import divided_of, training_execution

RESERVE = 0.03  # share of the memory that stays free
GATHERED = 4  # blocks whose weights are gathered at a time, for the estimate that ranks candidates
SLOTS = tuple(2_048 * 2**power for power in range(7))  # candidates for `slots_per_device`
TRIES_TO_FIT = 4
STEP_GIB = 0.5  # precision of `activations_gib`


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a stage runs.

    Attributes:
      mesh: devices along each mesh axis.
      slots_per_device: see `TransformerConfig`; it alone limits microbatches.
      activations_gib: see `ExecutionConfig`.
    """

    mesh: MeshShape
    slots_per_device: int
    activations_gib: float

    def overrides(self, config: StageConfig) -> list[str]:
        """The choice as changes of a config."""
        return [
            f"transformer.images_per_device={_unlimited(config)}",
            *(f"transformer.mesh.{axis}={size}" for axis, size in dataclasses.asdict(self.mesh).items()),
            f"transformer.slots_per_device={self.slots_per_device}",
            f"transformer.execution.keep='{FIT}'",
            f"transformer.execution.activations_gib={self.activations_gib:g}",
        ]

    def applied(self, config: StageConfig) -> StageConfig:
        """The config with this choice."""
        execution = dataclasses.replace(config.transformer.execution, keep=FIT, activations_gib=self.activations_gib)
        transformer = dataclasses.replace(
            config.transformer,
            mesh=self.mesh,
            images_per_device=_unlimited(config),
            slots_per_device=self.slots_per_device,
            execution=execution,
        )
        return dataclasses.replace(config, transformer=transformer)


def _unlimited(config: StageConfig) -> tuple[int, ...]:
    return (0,) * len(config.data.sides)


def search(
    name: str,
    config: StageConfig,
    topology: str,
    slices: int,
    captions: Captions | None,
    cache: Cache | None = None,
    tries: int = 3,
    progress: Callable[[str], Any] = lambda text: None,
) -> tuple[Choice, StagePlan]:
    """The choice with the lowest bound of an update's time among the candidates that were compiled.

    Args:
      name: name of the stage.
      config: config of the stage.
      topology: see `topology_mesh`.
      slices: number of slices.
      captions, cache: see `streams_of_stage`.
      tries: number of candidates to compile.
      progress: see `plan_stage`.

    Raises:
      ValueError: if no candidate fits.
    """
    found: list[tuple[Choice, StagePlan]] = []
    streams = streams_of_stage(config, captions, cache)
    ranked = sorted(_candidates(config, topology, slices, streams), key=lambda candidate: candidate[0])
    for number, (_, choice) in enumerate(ranked[:tries]):
        label = f"candidate {number + 1} of {min(tries, len(ranked))} ({_text(choice)}): "
        mesh = make_mesh(choice.mesh, topology_devices(topology, slices))
        told = lambda text, label=label: progress(label + text)  # noqa: E731
        fitted = _fitted(choice, config, mesh, streams, told)
        if fitted is None:
            continue
        chosen = fitted.applied(config)
        parts = parts_of(chosen, mesh, streams)
        places = binding_parts(chosen, parts, mesh)
        found.append((fitted, plan_stage(name, f"{slices} x {topology}", chosen, mesh, parts, places, told)))
    if not found:
        raise ValueError(
            f"none of the {min(tries, len(ranked))} best candidates for {name} fits {slices} x {topology}; try more "
            "with --tries, or a larger topology"
        )
    return min(found, key=lambda candidate: candidate[1].update_seconds)


def _text(choice: Choice) -> str:
    mesh = choice.mesh
    return f"data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}, {choice.slots_per_device:,} slots at once"


def _candidates(
    config: StageConfig, topology: str, slices: int, streams: Sequence[Stream]
) -> Iterator[tuple[float, Choice]]:
    """Estimated seconds of an update, and the choice, of everything that may fit."""
    devices = topology_devices(topology, slices)
    for mesh_shape in _meshes(devices, slices, config.transformer.model):
        mesh = make_mesh(mesh_shape, devices)
        if any(size % num_batch_shards(mesh) for size in config.transformer.batch_sizes):
            continue
        seen = set()
        for slots in SLOTS:
            choice = Choice(mesh_shape, slots, 0.0)
            parts = parts_of(choice.applied(config), mesh, streams)
            images = tuple(part.images for part in parts)
            budget = _budget(config, parts, mesh)
            if budget > 0 and images not in seen:
                seen.add(images)
                choice = dataclasses.replace(choice, activations_gib=round(budget / STEP_GIB) * STEP_GIB)
                yield _seconds(choice.applied(config), parts, mesh), choice


def _meshes(devices: Sequence[Any], slices: int, model: MMDiTConfig) -> Iterator[MeshShape]:
    """Meshes whose `fsdp` fills whole dims of a slice's torus, where the links form rings, or a slice with `tensor`."""
    dims = [len({device.coords[dim] for device in devices}) for dim in range(len(devices[0].coords))]
    sizes = [size for size in dims if size > 1]
    ring = CHIPS[devices[0].device_kind].ring if devices[0].device_kind in CHIPS else 1
    rings = {size for size in sizes if size % ring == 0}
    rings |= {a * b for a, b in itertools.combinations(sizes, 2)}
    for tensor in (1, 2, 4, 8):
        for fsdp in sorted(rings | {max(len(devices) // slices // tensor, 1)}):
            data, rest = divmod(len(devices), fsdp * tensor)
            if not rest and data and data % slices == 0 and model.heads % tensor == 0 and model.width % fsdp == 0:
                yield MeshShape(data, fsdp, tensor)


def _budget(config: StageConfig, parts: Sequence[Part], mesh: Any) -> float:
    """Estimated memory for activations, in GiB; below 0 if even the inputs of blocks do not fit."""
    model, dtype = config.transformer.model, config.transformer.execution.dtype
    state = sum(Trainer.of(config.transformer, mesh).state_bytes(accumulate=True).values())
    block = _matrices(model) * jnp.dtype(dtype).itemsize
    tokens = max(_tokens(part, mesh) for part in parts)
    unit = tokens * model.width * jnp.dtype(dtype).itemsize
    free = chip_of(mesh).hbm_bytes * (1 - RESERVE) - state - GATHERED * block
    return free / GIB if free > (model.layers + WORKING) * unit else -1.0


def _tokens(part: Part, mesh: Any) -> float:
    return part.images * part.layout.length / (num_batch_shards(mesh) * mesh.shape["tensor"])


def _seconds(config: StageConfig, parts: Sequence[Part], mesh: Any) -> float:
    """Estimated time of an update: executed operations, or the links' time if that is longer."""
    transformer, chip = config.transformer, chip_of(mesh)
    model, total = transformer.model, 0.0
    for part in parts:
        images = part.images // mesh.shape["data"]
        execution = training_execution(transformer.execution, model, part.layout, images, mesh)
        executed = flops_per_step(model, part.layout, part.images).executed(model, execution.keep)
        divided, tensor = divided_of(model, part.layout, images, mesh), mesh.shape["tensor"]
        wide = jnp.promote_types(execution.dtype, transformer.execution.shard_sum).itemsize
        # Weights are gathered in both passes, and their gradients scattered.
        weights = model.layers * _matrices(model) * (2 * jnp.dtype(execution.dtype).itemsize + wide)
        if divided == "heads":
            links = weights / tensor / bandwidth(mesh, ("fsdp",), chip)
        else:
            links = weights / bandwidth(mesh, ("fsdp", "tensor"), chip)
        if tensor > 1 and divided != "images":  # activations around attention and MLP, or tokens exchanged for heads
            times = 4.0 if divided == "heads" else 4 / tensor
            sent = 3 * times * model.layers * _tokens(part, mesh) * model.width * 2 * (tensor - 1)
            links += sent / bandwidth(mesh, ("tensor",), chip)
        total += part.microbatches * max(executed / (mesh.size * chip.flops), links)
    return total


def _matrices(model: MMDiTConfig) -> int:
    """Number of weights of a block."""
    return model.width**2 * (4 + 3 * model.mlp_ratio)


def _fitted(
    choice: Choice, config: StageConfig, mesh: Any, streams: Sequence[Stream], progress: Callable[[str], Any]
) -> Choice | None:
    """The choice with as much memory for activations as the largest program leaves; None if that does not fit."""
    limit = chip_of(mesh).hbm_bytes * (1 - RESERVE)
    parts = parts_of(choice.applied(config), mesh, streams)
    for attempt in range(TRIES_TO_FIT):
        trainer = Trainer.of(choice.applied(config).transformer, mesh)
        part = max(parts, key=functools.partial(activation_bytes, trainer))
        progress(f"does {part.name} fit with {choice.activations_gib:.1f} GiB of activations?")
        try:
            compiled, _ = trainer.compile_microbatch(part.layout, part.images)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            spare = -0.15 * limit
        else:
            spare = limit - memory_of(compiled).total - trainer.resident
            if spare >= 0:
                return choice
        less = round((choice.activations_gib + spare / GIB) / STEP_GIB - 0.5) * STEP_GIB
        if trainer.execution_of(part.layout, part.images).keep == "inputs":
            return None
        last = attempt == TRIES_TO_FIT - 2  # with the least that can be kept
        choice = dataclasses.replace(choice, activations_gib=0.0 if last else max(less, 0.0))
    return None
