"""The transformer as a task: encoded samples, their mixture, a loss, validation and sample grids."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from data_pipeline.buckets import Bucket
from data_pipeline.loading.mixture import Mixture, streams_of
from data_pipeline.samples.cache import Cache
from qi2_jax import sharding
from qi2_jax.interop.lora import reading
from qi2_jax.models import lora
from qi2_jax.models.flops import flops_of_tokens, flops_per_step
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.runs import paths
from qi2_jax.runtime import processes
from qi2_jax.runtime.chips import CHIPS
from qi2_jax.runtime.read_ahead import read_ahead
from qi2_jax.tasks import devices
from qi2_jax.tasks.transformer import fixed_prompts, grids, validation
from qi2_jax.tasks.transformer.adapter_start import base_of_adapter, continued
from qi2_jax.tasks.transformer.batches import AHEAD, Inputs
from qi2_jax.tasks.transformer.config import (
    StageConfig,
    TransformerConfig,
    abstract_transformer,
    check_samples,
    microbatches_of,
    model_config_for,
)
from qi2_jax.tasks.transformer.execution import execution_on, training_execution
from qi2_jax.tasks.transformer.objective import Objective, complete_already, make_loss
from qi2_jax.tasks.transformer.start import started_from, update_model_folder
from qi2_jax.tasks.transformer.validation import HeldOut
from qi2_jax.training import loop, restarting
from qi2_jax.training.mean import Mean
from qi2_jax.training.microbatch import USEFUL, Microbatch, as_update
from qi2_jax.training.step import TrainState
from qi2_jax.training.task import CheckSignals, Task
from qi2_jax.training.telemetry.metrics import Drawing


class Frozen(NamedTuple):
    """Arrays that the loss reads and training does not change.

    Attributes:
      text_encoder: encoder for text features that are computed within the step; None if they are cached.
      base: transformer that an adapter changes; None if the whole transformer is trained.
    """

    text_encoder: Any = None
    base: MMDiT | None = None


@dataclasses.dataclass(kw_only=True)
class TransformerTask(Task):
    """Training of the transformer, or of an adapter to it, on encoded samples.

    Attributes:
      config: group `transformer` of the config.
      data: see `Task`.
      samples: encoded samples.
      mixture: streams of the samples.
      inputs: encoders that complete batches.
      image_sizes: sizes of the images that `inputs` may have to encode.
      model_config: configuration of the transformer.
      adapter: configuration of the adapter; None: the whole transformer is trained.
      source: folder or adapter whose weights a new run starts from; None: random weights.
      base: run or model folder with the transformer that an adapter as `source` changes.
      objective: training objective.
      frozen: parameters that are not trained.
      held_out: held-out samples by stream.
      grids: sample grids to draw; None: no grids.
      mesh: devices of the run.
      model: model folder of the run.
    """

    config: TransformerConfig
    data: Mapping[str, Any]
    samples: Cache
    mixture: Mixture
    inputs: Inputs
    image_sizes: Sequence[Bucket]
    model_config: MMDiTConfig
    adapter: LoRAConfig | None
    source: pathlib.Path | None
    base: pathlib.Path | None
    objective: Objective
    frozen: Frozen
    held_out: Mapping[str, HeldOut]
    grids: grids.Grids | None
    mesh: Mesh
    model: pathlib.Path
    name: str = "transformer"
    evaluates: bool = True

    def __post_init__(self) -> None:
        turns, streams = self.config.batches_per_update, self.mixture.streams
        self.accumulate = turns > 1 or any(stream.microbatches > 1 for stream in streams)
        self.ema_ramp = self.config.ema_ramp or self.adapter is not None  # an adapter starts at zero
        chip = CHIPS.get(self.mesh.devices.flat[0].device_kind)
        self.peak_flops = chip.flops if chip else None
        self.draws = self.grids is not None
        self.replicas, self.sum_dtype = self.mesh.shape["data"], self.config.execution.replica_sum
        timesteps = self.config.timesteps.law
        self._validate = validation.make_validation(timesteps, self.objective, self.config.seed + 1)

    def make_model(self, key: jax.Array) -> Any:
        if self.adapter is None:
            return MMDiT(self.model_config, key=key)
        return lora.init(abstract_transformer(self.model_config), self.adapter, key=key)

    def loss(self, model: Any, frozen: Any, layout: Any, batch: Any, keys_B: jax.Array) -> Any:
        images = batch.latents_BNC.shape[0]
        execution = training_execution(self.config.execution, self.model_config, layout, images, self.mesh)
        objective = dataclasses.replace(self.objective, execution=execution, complete=complete_already)
        return make_loss(self.config.timesteps.law, objective)(model, frozen, layout, batch, keys_B)

    def prepare(self, frozen: Any, layout: Any, batch: Any) -> Any:
        return self.objective.complete(frozen, layout, batch)

    def updates(self, step: int) -> Iterator[Sequence[Microbatch]]:
        turns = self.config.batches_per_update
        microbatches = read_ahead(map(self._complete, self.mixture.from_turn(step * turns)), AHEAD)
        for turn in itertools.count(step * turns, turns):
            yield as_update(itertools.islice(microbatches, self.mixture.count_microbatches(turn, turns)))

    def examples(self) -> Sequence[Microbatch]:
        self.inputs.compile(self.image_sizes)
        loaders = [stream.loader for stream in self.mixture.streams]
        return [self._complete(loader.example(layout)) for loader in loaders for layout in loader.layouts]

    def _complete(self, microbatch: Microbatch) -> Microbatch:
        """A microbatch with everything that is computed on the host, and with its FLOPs."""
        layout, stats = microbatch.layout, microbatch.stats
        flops = functools.partial(flops_per_step, self.model_config, layout, adapter=self.adapter)
        valid_BS = microbatch.batch.cond.valid_BS  # of this process
        tokens = flops_of_tokens(self.model_config, layout, valid_BS, self.adapter)
        metrics = {**stats.metrics, USEFUL: Mean(tokens.model, flops(len(valid_BS)).model)}
        batch = self.inputs.complete_on_host(layout, microbatch.batch)
        return microbatch._replace(batch=batch, stats=stats._replace(flops=flops(stats.images).model, metrics=metrics))

    def initial_state(self, state: TrainState) -> TrainState:
        if self.source is None:
            return state
        if self.adapter is None:
            return started_from(state, self.source, self.mesh, self.base)
        if reading.is_adapter(self.source):
            return continued(state, self.source, self.adapter, self.mesh, self.model_config)
        return state

    def on_config_accepted(self) -> None:
        update_model_folder(self.config, self.samples, self.model, self.base)

    def evaluate(self, state: TrainState, check_signals: CheckSignals) -> dict[str, float]:
        of_ema, of_raw = (
            {name: self._validate(model, self.frozen, rows, check_signals) for name, rows in self.held_out.items()}
            for model in (state.ema, state.model)
        )
        return validation.report(of_ema, of_raw)

    def draw(self, state: TrainState, check_signals: CheckSignals) -> dict[str, Drawing]:
        assert self.grids is not None
        return self.grids.draw(state, check_signals)


def make_task(
    config: StageConfig,
    samples: Cache,
    out: pathlib.Path,
    mesh: Mesh,
    data: Mapping[str, Any],
    base: pathlib.Path | None = None,
) -> TransformerTask:
    """The task of a run.

    Args:
      config: config with the groups `data` and `transformer`.
      samples: encoded samples.
      out: folder of the run.
      mesh: devices of the run.
      data: identity of the samples and their mixture.
      base: run or model folder with the transformer that an adapter as `start.folder` changes.
    """
    stage, model = config.transformer, out / paths.MODEL
    model_config, adapter = model_config_for(stage, samples), stage.adapter
    source = pathlib.Path(stage.start.folder) if stage.start.folder else None
    with processes.raise_together():  # before anything else is on the devices
        encoder_dtype = devices.encoder_dtype(samples.fingerprint)
        fixed = fixed_prompts.encode(stage.samples, max(config.data.sides), model, mesh, encoder_dtype)
    inputs = Inputs(stage, samples, model, mesh)
    objective = Objective(stage.timesteps.shift, execution_on(stage.execution, mesh), complete=inputs.complete)
    frozen, identity = Frozen(inputs.text_encoder), data
    if adapter is not None:
        objective = dataclasses.replace(objective, assemble=lambda frozen, model: lora.join(frozen.base, model))
        transformer, digest = base_of_adapter(
            abstract_transformer(model_config), source, out, adapter, mesh, objective.execution.dtype, base
        )
        frozen, identity = frozen._replace(base=transformer), {**data, "base_transformer": digest}
    mixture = _mixture(config, samples, mesh)
    with processes.raise_together():
        held_out = {
            stream.name: validation.held_out_batches(stream, stage.validation.samples, mesh, inputs)
            for stream in mixture.streams
        }
    return TransformerTask(
        config=stage,
        data=identity,
        samples=samples,
        mixture=mixture,
        inputs=inputs,
        image_sizes=_image_sizes(config),
        model_config=model_config,
        adapter=adapter,
        source=source,
        base=base,
        objective=objective,
        frozen=frozen,
        held_out=held_out,
        grids=grids.make_grids(stage.samples, mixture.streams, fixed, objective, frozen, model, mesh, inputs),
        mesh=mesh,
        model=model,
    )


def _image_sizes(config: StageConfig) -> list[Bucket]:
    """The buckets of all areas that have a share."""
    sides = {key.side for key in config.data.shares.weights()}
    return [bucket for side in sides for bucket in config.data.resolutions.buckets(side).sizes]


def _mixture(config: StageConfig, samples: Cache, mesh: Mesh) -> Mixture:
    with processes.raise_together():
        if jax.process_index() == 0:  # it stores what a cache of an earlier version lacks, and the others read it
            for stream, _ in streams_of(samples, config.data.shares).values():
                _ = stream.lengths
    stage = config.transformer
    mixture = Mixture.of_cache(
        samples,
        config.data.shares,
        lambda key, layout: microbatches_of(config, key, layout, mesh),
        seed=stage.seed,
        dropout=stage.dropout,
        local_rows=lambda size: sharding.local_rows(mesh, size),
        slots=stage.text_slots,
    )
    if unused := mixture.unused(samples):
        processes.log_on_main(f"samples that data.mixture never reads, by stream (side-conditions: number): {unused}")
    return mixture


def train_transformer(
    config: StageConfig,
    samples: Cache,
    out: pathlib.Path,
    *,
    accept_changes: bool = False,
    restart: bool = False,
    base: pathlib.Path | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Trains the transformer on encoded samples, or resumes where an earlier call stopped.

    Args:
      config: config with the groups `data` and `transformer`. A new run starts from the weights in
        `transformer.start.folder`, or from random ones if that is empty.
      samples: encoded samples.
      out: folder of the run.
      accept_changes: see `loop.train`.
      restart: see `loop.train`.
      base: run or model folder with the transformer that an adapter changes, if `start.folder` is an adapter.
      prepare: function that completes the run's folder, see `start.prepare_model_folder`. Process 0 calls it after the
        checks that need no devices.

    Raises:
      ValueError: if the samples were not prepared as the group `data` says, or lack a stream that has a share, and as
        `loop.train`.
    """
    with processes.raise_together():
        check_samples(config, samples)
    restarting.check(out, restart=restart)
    with processes.raise_together():
        if jax.process_index() == 0:
            prepare()
    stage = config.transformer
    data = samples.fingerprint | {"mixture": dataclasses.asdict(config.data.mixture)}
    if stage.adapter is None and not accept_changes and loop.is_finished(stage, data, out):
        with processes.raise_together():
            if jax.process_index() == 0:
                update_model_folder(stage, samples, out / paths.MODEL, base)
        return
    mesh = devices.make_mesh(stage.mesh)
    for line in sharding.unsharded_weights(abstract_transformer(model_config_for(stage, samples)), mesh):
        processes.log_on_main(line)
    task = make_task(config, samples, out, mesh, data, base)
    loop.train(task, stage, out, mesh, accept_changes=accept_changes, restart=restart)
