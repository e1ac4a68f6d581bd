"""What a stage of the curriculum costs on a topology: its programs, how often each runs, and the time of all updates.

Dims: `d` drawn texts, `G` text segments.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from data_pipeline.loading.mixture import layout_of, min_gain, streams_of
from data_pipeline.loading.text_slots import choose_layouts
from data_pipeline.samples.cache import Cache, StreamKey
from data_pipeline.samples.lengths import TextLengths
from qi2_jax import sharding
from qi2_jax.models.flops import flops_per_step
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.models.recomputation import WORKING, kept_size
from qi2_jax.planning.captions import Captions
from qi2_jax.planning.compile import Trainer
from qi2_jax.planning.programs import (
    ProgramPlan,
    kernel_flops,
    no_kernels,
    plan_program,
    plan_train_program,
    text_of,
)
from qi2_jax.runtime.atomic import write_atomic
from qi2_jax.runtime.chips import chip_of
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.config import StageConfig, microbatches_of

KEYS = 1_536  # keys of a block of the attention kernel, about
MOST_DRAWN = 16_384  # texts of a stream from which its cost is computed


@dataclasses.dataclass(frozen=True)
class Part:
    """The microbatches of one program in a stage.

    Attributes:
      key: stream of the samples.
      layout: slots of a sequence.
      images: images of a microbatch.
      microbatches: mean number of its microbatches in an update.
      model_flops: mean model FLOPs of a microbatch's tokens, without padding.
      slot_flops: model FLOPs of its slots.
    """

    key: StreamKey
    layout: Layout
    images: int
    microbatches: float
    model_flops: float
    slot_flops: float

    @property
    def name(self) -> str:
        return f"{self.key}, {sum(self.layout.text)} text slots"

    @property
    def flops(self) -> float:
        """Model FLOPs of its slots in an update."""
        return self.microbatches * self.slot_flops


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of a stage.

    Attributes:
      name: name of the stage.
      topology: name of the topology and number of slices, such as "4 x v6e:16x16".
      mesh: devices along each mesh axis.
      updates: number of updates.
      images: mean number of images in an update.
      parts: programs of the stage, whether compiled or not.
      ways: what chips along `tensor` divide in each part, see `sharding.DIVIDED`.
      programs: compiled programs by the position of their part.
      apply: program that ends an update of several microbatches; None: an update has one.
      sampler: programs that draw images during training, if they were compiled.
      chips: number of chips.
      peak: peak operations per second of a chip.
      state: bytes of a chip for parameters with EMA, optimizer and sums of gradients.
    """

    name: str
    topology: str
    mesh: Mapping[str, int]
    updates: int
    images: float
    parts: tuple[Part, ...]
    ways: tuple[str, ...]
    programs: Mapping[int, ProgramPlan]
    apply: ProgramPlan | None
    sampler: tuple[ProgramPlan, ...]
    chips: int
    peak: float
    state: Mapping[str, int]

    @property
    def compiled(self) -> list[ProgramPlan]:
        """All compiled programs, those of microbatches first."""
        return [*self.programs.values(), *([self.apply] if self.apply else []), *self.sampler]

    def seconds_of(self, place: int) -> float:
        """Lower bound of the time of a part's microbatch.

        A program that was not compiled takes as long for a FLOP of its slots as the compiled program that has the
        nearest number of FLOPs, among those in which chips along `tensor` divide the work in the same way.
        """
        part = self.parts[place]
        if place in self.programs:
            return self.programs[place].bound.seconds

        def distance(other: int) -> tuple[bool, float]:
            differs = self.ways[place] != self.ways[other]
            return differs, abs(math.log(self.parts[other].slot_flops / part.slot_flops))

        nearest = min(self.programs, key=distance)
        return self.programs[nearest].bound.seconds * part.slot_flops / self.parts[nearest].slot_flops

    @property
    def update_seconds(self) -> float:
        """Lower bound of the mean time of an update."""
        microbatches = sum(part.microbatches * self.seconds_of(place) for place, part in enumerate(self.parts))
        return microbatches + (self.apply.bound.seconds if self.apply else 0.0)

    @property
    def model_flops(self) -> float:
        """Mean model FLOPs of an update's tokens, without padding."""
        return sum(part.microbatches * part.model_flops for part in self.parts)

    @property
    def slot_flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def mfu_bound(self) -> float:
        """Upper bound of the utilisation by tokens."""
        return self.model_flops / (self.chips * self.peak * self.update_seconds)

    def days(self, utilisation: float | None = None) -> float:
        """Days of all updates: a lower bound, or those at a utilisation of the peak rate by all slots."""
        seconds = self.update_seconds
        if utilisation is not None:
            seconds = self.slot_flops / (self.chips * self.peak * utilisation)
        return self.updates * seconds / 86_400


@dataclasses.dataclass(frozen=True)
class Stream:
    """The texts of a stream, by the layout in which they are computed.

    Attributes:
      key: stream of the samples.
      share: share of the batches that are of this stream.
      layouts: layouts, from the fewest to the most text slots.
      texts: lengths of drawn texts for which each layout is the smallest one.
    """

    key: StreamKey
    share: float
    layouts: tuple[Layout, ...]
    texts: tuple[Int[np.ndarray, "d G"], ...]


def streams_of_stage(config: StageConfig, captions: Captions | None, cache: Cache | None = None) -> list[Stream]:
    """The streams of a stage, whatever the mesh.

    Args:
      config: config of the stage.
      captions: distribution of the captions' lengths; None: that of `cache`.
      cache: encoded samples of the stage.

    Raises:
      ValueError: if the cache lacks a stream of the stage.
    """
    transformer, weights = config.transformer, config.data.shares.weights()
    found = []
    for key, weight in weights.items():
        largest, lengths, empty = _texts(config, key, captions, cache)
        gain, most = min_gain(weights, key), transformer.text_slots.layouts
        layouts = choose_layouts(largest, lengths, empty, transformer.dropout, most, gain)
        drawn = _drawn(lengths, empty, transformer.dropout)
        places = np.searchsorted([layout.text[-1] for layout in layouts], drawn[:, -1])
        texts = tuple(drawn[places == place] for place in range(len(layouts)))
        found.append(Stream(key, weight / sum(weights.values()), layouts, texts))
    return found


def parts_of(config: StageConfig, mesh: Mesh, streams: Sequence[Stream]) -> list[Part]:
    """The programs of a stage and how often each runs, the most expensive first.

    Args:
      config: config of the stage.
      mesh: devices of the run.
      streams: result of `streams_of_stage`.
    """
    found = []
    for stream in streams:
        count, images = microbatches_of(config, stream.key, stream.layouts[-1], mesh)
        total = sum(map(len, stream.texts))
        for layout, texts in zip(stream.layouts, stream.texts, strict=True):
            if len(texts):
                share = config.transformer.batches_per_update * stream.share * len(texts) / total
                slots = flops_per_step(config.transformer.model, layout, images).model
                tokens = images * _mean_flops(config.transformer.model, layout, texts)
                found.append(Part(stream.key, layout, images, count * share, tokens, slots))
    return sorted(found, key=lambda part: -part.flops)


def _mean_flops(model: MMDiTConfig, layout: Layout, texts: Int[np.ndarray, "d G"]) -> float:
    """Mean model FLOPs of an image with texts of these lengths, without padding."""
    lengths, counts = np.unique(texts, axis=0, return_counts=True)
    flops = [flops_per_step(model, _exactly(layout, length), 1).model for length in lengths]
    return float(np.average(flops, weights=counts))


def _texts(
    config: StageConfig, key: StreamKey, captions: Captions | None, cache: Cache | None
) -> tuple[Layout, TextLengths, tuple[int, ...]]:
    """The largest layout of a stream, the lengths of its texts, and the empty prompt's."""
    if cache is not None:
        stream, held_out = streams_of(cache, config.data.shares)[key]
        empty = tuple(cache.empty.lengths)
        return layout_of(stream.largest | held_out.largest, empty), stream.lengths, empty
    assert captions is not None
    tokens = dict((side, buckets.max_tokens) for side, buckets in config.data.resolutions.areas)[key.side]
    lengths, empty = captions.lengths(key.conditions, MOST_DRAWN)
    return Layout(captions.longest(key.conditions), tokens, (tokens,) * key.conditions), lengths, empty


def _drawn(lengths: TextLengths, empty: tuple[int, ...], dropout: float) -> Int[np.ndarray, "d G"]:
    """Lengths of texts as the loader draws them."""
    samples = np.linspace(0, len(lengths.texts) - 1, min(len(lengths.texts), MOST_DRAWN)).astype(np.int64)
    rng = np.random.default_rng(0)
    chosen = (rng.random(len(samples)) * lengths.choices(samples)).astype(np.int64)
    return lengths.drawn(samples, chosen, rng.random(len(samples)) < dropout, empty)


def _exactly(layout: Layout, lengths: Sequence[int]) -> Layout:
    return dataclasses.replace(layout, text=tuple(int(length) for length in lengths))


def binding_parts(config: StageConfig, parts: Sequence[Part], mesh: Mesh) -> list[int]:
    """Positions of the parts that decide about memory and time.

    For each way in which chips along `tensor` divide the work, these are the part that is estimated to need the most
    memory and the one with the most FLOPs.
    """
    trainer, found = Trainer.of(config.transformer, mesh), set()
    ways = [trainer.divided(part.layout, part.images) for part in parts]
    for way in set(ways):
        places = [place for place, other in enumerate(ways) if other == way]
        found.add(max(places, key=lambda place: activation_bytes(trainer, parts[place])))
        found.add(max(places, key=lambda place: parts[place].flops))
    return sorted(found)


def activation_bytes(trainer: Trainer, part: Part) -> float:
    """Estimated memory of a chip for the activations of a program, to compare programs.

    Besides what the blocks keep and their working memory, the backward pass of attention writes a partial gradient of
    the queries for each block of keys.
    """
    model, mesh = trainer.model, trainer.mesh
    images = part.images / (sharding.num_batch_shards(mesh) * mesh.shape["tensor"])
    unit = images * part.layout.length * model.width * jnp.dtype(trainer.execution.dtype).itemsize
    keep = trainer.execution_of(part.layout, part.images).keep
    return unit * (model.layers * kept_size(keep, model.mlp_ratio) + WORKING + part.layout.length / KEYS)


def plan_stage(
    name: str,
    topology: str,
    config: StageConfig,
    mesh: Mesh,
    parts: Sequence[Part],
    places: Sequence[int],
    progress: Callable[[str], Any] = lambda text: None,
    hlo: Path | None = None,
    sampler: bool = False,
) -> StagePlan:
    """Compiles programs of a stage and bounds the time of all its updates.

    Args:
      name, topology: see `StagePlan`.
      config: config of the stage.
      mesh: see `topology_mesh`.
      parts: result of `parts_of`.
      places: positions of the parts to compile, at least one.
      progress: function that is called with a text before each compilation.
      hlo: folder for the compiled programs as HLO text; None: they are not written.
      sampler: whether to compile the programs that draw images during training too, for the part with the most slots.

    Raises:
      ValueError: for a stage that trains an adapter.
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if a program does not fit the chip.
    """
    transformer = config.transformer
    trainer = Trainer.of(transformer, mesh)
    accumulate = transformer.batches_per_update > 1 or any(
        part.images < transformer.batch_sizes[config.data.sides.index(part.key.side)] for part in parts
    )
    programs = {}
    for number, place in enumerate(places):
        progress(f"compiling program {number + 1} of {len(places) + accumulate}: {parts[place].name}")
        programs[place] = _plan_part(trainer, parts[place], accumulate, hlo)
    apply: ProgramPlan | None = None
    drawing: tuple[ProgramPlan, ...] = ()
    if accumulate:
        progress(f"compiling program {len(places) + 1} of {len(places) + 1}: the end of an update")
        compiled, seconds = trainer.compile_apply(parts[places[0]].layout, parts[places[0]].images)
        apply = plan_program("end of an update", 0, mesh, compiled, seconds, no_kernels)
    if sampler:
        progress("compiling the sampler")
        drawing = _plan_sampler(trainer, max(parts, key=lambda part: part.layout.length), accumulate)
    return StagePlan(
        name,
        topology,
        dict(mesh.shape),
        updates=transformer.train.steps,
        images=sum(part.microbatches * part.images for part in parts),
        parts=tuple(parts),
        ways=tuple(trainer.divided(part.layout, part.images) for part in parts),
        programs=programs,
        apply=apply,
        sampler=drawing,
        chips=mesh.size,
        peak=chip_of(mesh).flops,
        state=trainer.state_bytes(accumulate),
    )


def _plan_part(trainer: Trainer, part: Part, accumulate: bool, hlo: Path | None) -> ProgramPlan:
    compile_part = trainer.compile_microbatch if accumulate else trainer.compile_update
    compiled, seconds = compile_part(part.layout, part.images)
    if hlo:
        write_atomic(hlo / f"{part.name.replace(', ', '-').replace(' ', '-')}.txt", text_of(compiled).encode())
    execution = trainer.execution_of(part.layout, part.images)
    divided = trainer.divided(part.layout, part.images)
    plan = plan_train_program(
        part.name, trainer.model, part.layout, part.images, execution, divided, trainer.mesh, compiled, seconds
    )
    return dataclasses.replace(plan, resident=trainer.resident if accumulate else 0)


def _plan_sampler(trainer: Trainer, part: Part, accumulate: bool) -> tuple[ProgramPlan, ...]:
    """The programs that draw one image per shard of a batch. They read the EMA, and the rest of the state stays."""
    images, mesh = sharding.num_batch_shards(trainer.mesh), trainer.mesh
    prefix, step = trainer.compile_sampler(part.layout, images)
    until = part.layout.visible_until(trainer.model.attention)[: part.layout.prefix]
    programs = (
        plan_program("sampler: prefix", images, mesh, *prefix, kernel_flops(until)),
        plan_program("sampler: a step", images, mesh, *step, kernel_flops(None)),
    )
    resident = sum(size for name, size in trainer.state_bytes(accumulate).items() if name != "EMA")
    return tuple(dataclasses.replace(program, resident=resident) for program in programs)
