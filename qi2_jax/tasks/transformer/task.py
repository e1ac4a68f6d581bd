"""The transformer stage: encoded samples, a start, and what training, validation and pictures read of them."""

import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipeline.buckets import Resolutions
from data_pipeline.loading.loader import Rows
from data_pipeline.loading.mixture import Mixture, Stream
from data_pipeline.samples.cache import Cache
from qi2_jax import sharding
from qi2_jax.config import loading as configs
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.interop import folder
from qi2_jax.interop.lora import reading
from qi2_jax.models import lora
from qi2_jax.models.flops import flops_per_step
from qi2_jax.models.mmdit import Execution, MMDiT
from qi2_jax.runs import model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.runtime.chips import CHIPS
from qi2_jax.tasks import stages
from qi2_jax.tasks.transformer import fixed_prompts, grids, validation
from qi2_jax.tasks.transformer import objective as training
from qi2_jax.tasks.transformer.adapter_start import base_of_adapter, continued
from qi2_jax.tasks.transformer.batches import Inputs, ahead
from qi2_jax.tasks.transformer.config import check_samples, law_of, lora_of, shares_of, transformer_config
from qi2_jax.tasks.transformer.start import made_samples, started_from
from qi2_jax.tasks.transformer.validation import held_out_batches
from qi2_jax.training import loop
from qi2_jax.training.reader import Feed, Update
from qi2_jax.training.step import TrainState


class Frozen(NamedTuple):
    """What the loss reads and training does not change.

    Attributes:
      base: of an adapter, the transformer that it changes.
    """

    text_encoder: Any = None
    base: MMDiT | None = None


def train_transformer(
    config: Any, samples: Cache, out: pathlib.Path, *, accept_changes: bool = False, base: pathlib.Path | None = None
) -> None:
    """Trains the transformer on encoded samples; continues where an earlier call stopped.

    Args:
      config: with the groups `data` and `transformer`.
      out: the run. A new one begins with the weights of `transformer.start.folder`, or random ones where that is empty.
      accept_changes: see `loop.train`.
      base: run or model folder with the transformer that an adapter changes, where `start.folder` is an adapter.

    Raises:
      ValueError: if the samples were prepared in another way than `config.data` says, or lack a stream that it asks
        for, and as `loop.train`.
    """
    check_samples(config, samples)
    data, config = config.data, config.transformer
    data_of_run = samples.fingerprint | {"mixture": configs.to_dict(data.mixture)}
    adapter = lora_of(config)
    model_config = transformer_config(config, samples)

    def accepted() -> None:
        """What the run trains by holds for sampling and export, too: of an accepted change, or of a late `--model`."""
        if (out / paths.MODEL / folder.MARK).is_file() or made_samples(out / paths.MODEL, samples):
            model_folder.finish(out / paths.MODEL, model_config, Shift(**config.timesteps.shift))

    if adapter is None and not accept_changes and loop.is_finished(config, data_of_run, out):
        with processes.agreed():
            if jax.process_index() == 0:
                accepted()
        return
    mesh = stages.mesh_of(config.mesh)
    like = jax.eval_shape(lambda: MMDiT(model_config, key=jax.random.key(0)))
    for line in sharding.left_whole(like, mesh):
        processes.say(line)
    run = Execution(
        stages.dtype_of(config.execution.dtype),
        sharding.Attention(mesh, config.execution.kernel),
        config.execution.remat,
        sharding.Constrain(mesh),
    )
    with processes.agreed():  # before anything else is on the devices
        encoded_in = stages.dtype_of(samples.fingerprint.get("dtype", "float32"))
        fixed = fixed_prompts.encode(config.samples, max(data.sides), out / paths.MODEL, mesh, encoded_in)
    inputs = Inputs(config, samples, out / paths.MODEL, mesh)
    source = pathlib.Path(config.start.folder) if config.start.folder else None
    if adapter is None:
        objective = training.Objective(Shift(**config.timesteps.shift), run, complete=inputs.complete)
        frozen = Frozen(inputs.encoder)
    else:
        objective = training.Objective(
            Shift(**config.timesteps.shift), run, lambda frozen, model: lora.join(frozen.base, model), inputs.complete
        )
        transformer, data_of_run["base_transformer"] = base_of_adapter(
            like, source, out, adapter, mesh, run.dtype, base
        )
        frozen = Frozen(inputs.encoder, transformer)
    shares = shares_of(data)
    mixture = Mixture.of_cache(
        samples,
        shares,
        [
            stages.parts_of(mesh, size, at_once)
            for size, at_once in zip(config.batch_sizes, config.images_per_device, strict=True)
        ],
        seed=config.seed,
        dropout=config.dropout,
        own_rows=lambda size: sharding.own_rows(mesh, size),
    )
    if unused := mixture.unused(samples):
        processes.say(f"data.mixture gives no steps to these samples (side-conditions: number): {unused}")

    def feed(part: tuple[Stream, Rows]) -> Feed:
        stream, rows = part
        loader = stream.loader
        facts = {f"batch/{name}": value for name, value in rows.composition.items()}
        facts["batch/side"], facts["batch/conditions"] = map(float, stream.name.split("-"))
        # Of all slots in an interval: the mean of batches of different lengths would be another number.
        for name, slots in (("padding", loader.layout.length), ("padding_text", sum(loader.layout.text))):
            count = loader.batch_size * slots
            facts |= {f"batch/{name}_sum": count * facts.pop(f"batch/{name}"), f"batch/{name}_count": count}
        return Feed(
            loader.layout,
            inputs.to_batch(loader.layout, rows),
            loader.batch_size,
            facts,
            loader.batch_size * loader.layout.length,
            flops_per_step(model_config, loader.layout, loader.batch_size, adapter).model,
        )

    turns = config.batches_per_update

    def updates(start: int) -> Iterator[Update]:
        feeds = ahead(map(feed, mixture.from_turn(start * turns)))
        for step in itertools.count(start):
            streams = [mixture.streams[mixture.turn(step * turns + turn).stream] for turn in range(turns)]
            count, images = (sum(getattr(stream, name) for stream in streams) for name in ("parts", "images"))
            yield Update(itertools.islice(feeds, count), images)

    def examples() -> list[Feed]:
        areas = {key.side for key in shares.weights()}
        resolutions = Resolutions.of_config(data)
        inputs.compile(bucket for side in areas for bucket in resolutions.buckets(side).sizes)
        return [feed((stream, stream.loader.batches()[0])) for stream in mixture.streams]

    with processes.agreed():
        held = {
            stream.name: held_out_batches(stream, config.validation.samples, mesh, inputs) for stream in mixture.streams
        }
    law = law_of(config)
    validate = validation.make_validation(law, objective, config.seed + 1)

    def evaluate(state: TrainState, unless_terminating: Callable[[], None]) -> dict[str, float]:
        of_ema = {name: validate(state.ema, frozen, *own, unless_terminating) for name, own in held.items()}
        of_raw = {name: validate(state.model, frozen, *own, unless_terminating) for name, own in held.items()}
        by_time = np.mean(list(of_ema.values()), axis=0)
        return {
            "validation_loss": float(by_time.mean()),
            **{f"validation_loss/ema/{name}": float(losses.mean()) for name, losses in of_ema.items()},
            **{f"validation_loss/raw/{name}": float(losses.mean()) for name, losses in of_raw.items()},
            **{f"validation_loss/ema_t/{place:02d}": float(loss) for place, loss in enumerate(by_time)},
            **{
                f"validation_loss/{kind}_t/{name}/{place:02d}": float(loss)
                for kind, found in (("ema", of_ema), ("raw", of_raw))
                for name, losses in found.items()
                for place, loss in enumerate(losses)
            },
        }

    def make_model(key: jax.Array) -> Any:
        return MMDiT(model_config, key=key) if adapter is None else lora.init(like, adapter, key=key)

    def started(state: TrainState) -> TrainState:
        if source is None:
            return state
        if adapter is None:
            return started_from(state, source, mesh, base)
        return continued(state, source, adapter, mesh, model_config) if reading.is_adapter(source) else state

    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    task = loop.Task(
        "transformer",
        make_model,
        training.make_loss(law, objective),
        updates,
        examples,
        data_of_run,
        turns > 1 or any(stream.parts > 1 for stream in mixture.streams),
        frozen,
        started,
        accepted,
        evaluate,
        grids.drawer(config.samples, mixture, fixed, objective, frozen, out / paths.MODEL, mesh, inputs),
        config.ema_ramp or adapter is not None,  # an adapter always begins at nothing
        chip.flops if chip else None,
    )
    loop.train(task, config, out, mesh, accept_changes=accept_changes)
