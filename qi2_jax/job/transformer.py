"""The transformer stage: encoded samples, a start, and what training, validation and pictures read of them."""

import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipeline import encode
from data_pipeline.buckets import Resolutions
from data_pipeline.cache import Cache, check_fingerprint
from data_pipeline.loader import Row, Rows, collate
from data_pipeline.mixture import Mixture, Stream, streams_of
from qi2_jax import config as configs
from qi2_jax import encoders, processes, runs, sharding, tree
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.interop import folder
from qi2_jax.interop import weights as storage
from qi2_jax.job import fixed_prompts, grids, models, stages
from qi2_jax.job.inputs import Inputs, ahead
from qi2_jax.models import lora
from qi2_jax.models.mmdit import Execution, MMDiT, MMDiTConfig
from qi2_jax.planning.chips import CHIPS
from qi2_jax.planning.flops import flops_per_step
from qi2_jax.sequence import Layout
from qi2_jax.training import checkpoint, loop
from qi2_jax.training import mmdit as training
from qi2_jax.training.step import TrainState


class Frozen(NamedTuple):
    """What the loss reads and training does not change.

    Attributes:
      base: of an adapter, the transformer that it changes.
    """

    text_encoder: Any = None
    base: MMDiT | None = None


def transformer_config(config: Any, samples: Cache) -> MMDiTConfig:
    """The transformer's configuration, with the widths that the encoded samples have."""
    sample = samples.streams[0][0]
    return MMDiTConfig(
        **configs.dataclass_fields(config.model),
        latent_channels=sample.latents.shape[-1] or samples.fingerprint["latent_channels"],
        text_width=sample.texts[0].features.shape[-1] or samples.fingerprint["text_width"],
    )


def give_model(config: Any, samples: Cache, source: pathlib.Path | None, out: pathlib.Path) -> None:
    """Puts the encoders that made the samples into a run, so that it can sample and be exported.

    Args:
      config: of the transformer stage.
      samples: what the run trains on.
      source: a model folder, or a run or job with one; None: that of the job which the samples belong to, or none.
      out: the run.

    Raises:
      ValueError: if the source is no model folder, or its encoders did not make these samples.
    """
    model = out / runs.MODEL
    made = (model / folder.MARK).is_file()
    if source is not None:
        found = runs.model_of(source)
    else:
        found = model if made else samples.folder.parent / runs.TRANSFORMER / runs.MODEL
    if not (found / folder.MARK).is_file():
        if source is not None:
            raise ValueError(f"{found} is not a complete model folder (no {folder.MARK})")
        if _made(model, samples):  # an earlier call was refused after it had put them there
            return
        print(f"{found} does not exist: this run can train, but not sample; name the encoders' folder with --model")
        return
    differing = [name for name, digest in encoders.digests(found).items() if samples.fingerprint.get(name) != digest]
    if differing:
        raise ValueError(f"{differing} of {found} did not make the samples in {samples.folder}; see --model")
    if not made:
        models.adopt(found, model)
        if not _made(model, samples):
            raise ValueError(f"{model} holds files of other models, from a call that was refused; delete it")
    # The config may still change where nothing is trained yet; else it is compared first, see `train_transformer`.
    if not checkpoint.steps(out / runs.CHECKPOINTS):
        models.finish(model, transformer_config(config, samples), Shift(**config.timesteps.shift))


def _made(model: pathlib.Path, samples: Cache) -> bool:
    """Whether a folder has the encoders that made the samples."""
    try:
        return all(samples.fingerprint.get(name) == digest for name, digest in encoders.digests(model).items())
    except OSError:  # of files that are not there
        return False


def check_samples(config: Any, samples: Cache) -> None:
    """Checks that a config's `data` group describes encoded samples.

    Raises:
      ValueError: if they were prepared in another way, or lack a stream that has a share.
    """
    check_fingerprint(samples.folder, samples.fingerprint, encode.preprocessing(config.data))
    streams_of(samples, stages.shares_of(config.data))


def train_transformer(config: Any, samples: Cache, out: pathlib.Path, *, accept_changes: bool = False) -> None:
    """Trains the transformer on encoded samples; continues where an earlier call stopped.

    Args:
      config: with the groups `data` and `transformer`.
      out: the run. A new one begins with the weights of `transformer.start.folder`, or random ones where that is empty.
      accept_changes: see `loop.train`.

    Raises:
      ValueError: if the samples were prepared in another way than `config.data` says, or lack a stream that it asks
        for, and as `loop.train`.
    """
    check_samples(config, samples)
    data, config = config.data, config.transformer
    data_of_run = samples.fingerprint | {"mixture": configs.to_dict(data.mixture)}
    adapter = stages.lora_of(config)
    model_config = transformer_config(config, samples)

    def accepted() -> None:
        """What the run trains by holds for sampling and export, too: of an accepted change, or of a late `--model`."""
        if (out / runs.MODEL / folder.MARK).is_file() or _made(out / runs.MODEL, samples):
            models.finish(out / runs.MODEL, model_config, Shift(**config.timesteps.shift))

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
        fixed = fixed_prompts.encode(config.samples, max(data.sides), out / runs.MODEL, mesh, encoded_in)
    inputs = Inputs(config, samples, out / runs.MODEL, mesh)
    source = pathlib.Path(config.start.folder) if config.start.folder else None
    if adapter is None:
        objective = training.Objective(Shift(**config.timesteps.shift), run, complete=inputs.complete)
        frozen = Frozen(inputs.encoder)
    else:
        objective = training.Objective(
            Shift(**config.timesteps.shift), run, lambda frozen, model: lora.join(frozen.base, model), inputs.complete
        )
        base, data_of_run["base_transformer"] = _base(like, source, out, adapter.rank, mesh, run.dtype)
        frozen = Frozen(inputs.encoder, base)
    shares = stages.shares_of(data)
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

    def feed(part: tuple[Stream, Rows]) -> loop.Feed:
        stream, rows = part
        loader = stream.loader
        facts = {f"batch/{name}": value for name, value in rows.composition.items()}
        facts["batch/side"], facts["batch/conditions"] = map(float, stream.name.split("-"))
        # Of all slots in an interval: the mean of batches of different lengths would be another number.
        for name, slots in (("padding", loader.layout.length), ("padding_text", sum(loader.layout.text))):
            count = loader.batch_size * slots
            facts |= {f"batch/{name}_sum": count * facts.pop(f"batch/{name}"), f"batch/{name}_count": count}
        return loop.Feed(
            loader.layout,
            inputs.to_batch(loader.layout, rows),
            loader.batch_size,
            facts,
            loader.batch_size * loader.layout.length,
            flops_per_step(model_config, loader.layout, loader.batch_size, adapter).model,
        )

    turns = config.batches_per_update

    def updates(start: int) -> Iterator[loop.Update]:
        feeds = ahead(map(feed, mixture.from_turn(start * turns)))
        for step in itertools.count(start):
            streams = [mixture.streams[mixture.turn(step * turns + turn).stream] for turn in range(turns)]
            count, images = (sum(getattr(stream, name) for stream in streams) for name in ("parts", "images"))
            yield loop.Update(itertools.islice(feeds, count), images)

    def examples() -> list[loop.Feed]:
        areas = {key.side for key in shares.weights()}
        resolutions = Resolutions.of_config(data)
        inputs.compile(bucket for side in areas for bucket in resolutions.buckets(side).sizes)
        return [feed((stream, stream.loader.batches()[0])) for stream in mixture.streams]

    with processes.agreed():
        held = {stream.name: _held(stream, config.validation.samples, mesh, inputs) for stream in mixture.streams}
    law = stages.law_of(config)
    validate = training.make_validation(law, objective, config.seed + 1)

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
        return state if source is None or adapter is not None else started_from(state, source, mesh)

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
        grids.drawer(config.samples, mixture, fixed, objective, frozen, out / runs.MODEL, mesh, inputs),
        config.ema_ramp or adapter is not None,  # an adapter always begins at nothing
        chip.flops if chip else None,
    )
    loop.train(task, config, out, mesh, accept_changes=accept_changes)


def started_from(state: TrainState, source: pathlib.Path, mesh: Mesh) -> TrainState:
    """A state with the weights of a run, checkpoint or imported folder; of a run raw and averaged ones, each in their
    place.

    Raises:
      ValueError: if the source is none of these, or its weights have other shapes (all are named).
    """
    like, located = jax.eval_shape(lambda: state.model), runs.locate(source)
    with processes.agreed():
        if jax.process_index() == 0:
            located.check()

    def load(item: str) -> MMDiT:
        weights = located.weights("transformer", item)
        _check_fits(weights, like, source)
        return storage.load(weights, like, sharding.shardings(like, mesh), np.float32)

    return state._replace(model=load("model"), ema=load("ema"))


def _base(
    like: MMDiT, source: pathlib.Path | None, run: pathlib.Path, rank: int, mesh: Mesh, dtype: Any
) -> tuple[MMDiT, str]:
    """The transformer that an adapter changes, and its digest; from the run's beginning on it stands in the run's model
    folder.

    Raises:
      ValueError: if there is none, it has other shapes than the config's, or the run was begun without an adapter.
    """
    place, digest = run / runs.MODEL / "transformer", ""
    with processes.agreed():
        if jax.process_index() == 0:
            if not checkpoint.steps(run / runs.CHECKPOINTS):  # it may still change
                if source is None:
                    raise ValueError("lora.rank is above 0: name the transformer to adapt with --start")
                located = runs.locate(source)
                located.check()
                weights = located.weights("transformer")
                _check_fits(weights, like, source)
                models.save_weights(place, weights)
            elif (run / runs.CONFIG).is_file() and runs.lora_of(run) is None:
                raise ValueError(
                    f"{run} was begun with other values; go on with those, or begin an adapter of its model in another "
                    f"folder with --start {run}. What changed:\n  lora.rank: 0 -> {rank}"
                )
            digest = _digest(sorted(place.glob("*.safetensors")))
    digest = processes.gather(digest)[0]
    shapes = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    weights = storage.of_ours(place, shapes)[0]
    return storage.load(weights, like, sharding.shardings(like, mesh), dtype), f"sha256:{digest}"


def _digest(paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 of one file, as `sha256sum` prints it; of several that of their digests."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _check_fits(weights: storage.Weights, like: MMDiT, source: pathlib.Path) -> None:
    expected = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    storage.check_ours({name: weight.shape for name, weight in weights.items()}, expected, str(source))


def _held(stream: Stream, most: int, mesh: Mesh, inputs: Inputs) -> tuple[list[tuple[Layout, training.Batch]], int]:
    """The first held samples of a stream on the mesh, and how many they are; further rows fill the last batch."""
    loader, count = stream.loader, min(most, len(stream.held))
    parts = sharding.batch_parts(mesh)
    size = min(loader.batch_size, -(-count // parts) * parts)
    batches = []
    for start in range(0, count, size):
        samples = (stream.held[(start + row) % count] for row in sharding.own_rows(mesh, size))
        rows = collate(loader.layout, [Row(sample, sample.texts[0]) for sample in samples])
        batches.append((loader.layout, sharding.put_batch(mesh, inputs.to_batch(loader.layout, rows), size)))
    return batches, count
