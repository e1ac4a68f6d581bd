"""The autoencoder as a task: it is trained on random crops of images."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float
from PIL import Image

from data_pipeline.loading.crop_batches import Phases
from data_pipeline.loading.crops import SelectedImages
from qi2_jax import sharding
from qi2_jax.interop import stored_weights
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.pixels import over_white, to_image
from qi2_jax.reporting.grid import lay_out
from qi2_jax.runs import model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.tasks.autoencoder import adversary, batches, latent_statistics, networks, validation
from qi2_jax.tasks.autoencoder.alignment import Schedule, schedule
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig
from qi2_jax.tasks.autoencoder.latent_statistics import Moments
from qi2_jax.tasks.autoencoder.linear_start import start_linear
from qi2_jax.tasks.autoencoder.networks import Networks
from qi2_jax.tasks.autoencoder.objective import Objective, reconstruct
from qi2_jax.tasks.autoencoder.phases import make_phases
from qi2_jax.tasks.autoencoder.trained_vae import TrainedVAE, make_model
from qi2_jax.tasks.autoencoder.validation import HeldOut
from qi2_jax.tasks.devices import make_mesh
from qi2_jax.training import loop
from qi2_jax.training.checkpoints import contents
from qi2_jax.training.microbatch import Microbatch
from qi2_jax.training.step import IsTrained, TrainState
from qi2_jax.training.task import CheckSignals, Task
from qi2_jax.training.telemetry.metrics import Drawing

COLUMNS = ("original", "reconstruction")


@dataclasses.dataclass(kw_only=True)
class AutoencoderTask(Task):
    """Training of the autoencoder on crops.

    Attributes:
      config: config of the stage.
      data: see `Task`.
      frozen: frozen networks of the loss.
      model_config: configuration of the autoencoder.
      images: training images.
      crops: training crops of all phases.
      validation: crops of held-out images.
      drawn: held-out images that are drawn, in [-1, 1].
      records: positions of the drawn images in their folder of records.
      mesh: devices of the run.
    """

    config: AutoencoderConfig
    data: Mapping[str, Any]
    frozen: Networks
    model_config: VAEConfig
    images: SelectedImages
    crops: Phases
    validation: HeldOut
    drawn: Float[np.ndarray, "B H W c"]
    records: Sequence[int]
    mesh: Mesh
    name: str = "autoencoder"
    evaluates: bool = True
    draws: bool = True

    def __post_init__(self) -> None:
        self.ema_ramp = self.config.ema_ramp
        config = self.config
        self._objective = Objective.of(config, self.mesh)
        self._validate = validation.make_validation(self._objective, self.mesh)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        self._reconstruct = jax.jit(reconstruct, out_shardings=replicated)

    def make_model(self, key: jax.Array) -> TrainedVAE:
        return make_model(self.config, self.frozen.features, key)

    def initial_state(self, state: TrainState) -> TrainState:
        if not self.config.linear_start:
            return state
        processes.log_on_main("fitting the linear code from which the autoencoder starts")
        # Every process computes the same weights from the same images.
        model = self.make_model(jax.random.key(self.config.seed))
        start_linear(model, list(itertools.islice(self.whole_batches(0), self.config.linear_start)))

        def place(weight: Any, old: Any) -> Any:
            values = np.asarray(weight)
            return jax.make_array_from_callback(old.shape, old.sharding, lambda index: values[index])

        # Two calls, because an update reuses the memory of both.
        first, ema = (jax.tree.map(place, model, state.model) for _ in range(2))
        return state._replace(model=first, ema=ema)

    def loss(self, model: Any, frozen: Any, layout: Any, batch: Any, keys_B: jax.Array) -> Any:
        if not layout.perceptual:
            frozen = frozen._replace(lpips=None)
        loss = self._objective.adversarial_loss if layout.adversarial else self._objective.loss
        return loss(model, frozen, None, batch, keys_B)

    def trained(self, layout: batches.Layout) -> IsTrained | None:
        adversarial = self.config.adversarial
        if not adversarial.weight:
            return None
        if layout.adversarial:
            return adversary.trained_in_phase(self.model_config, adversarial.levels)
        return lambda name: not adversary.is_discriminator(name)

    def updates(self, step: int) -> Iterator[Sequence[Microbatch]]:
        for number, batch in enumerate(self.crops.from_step(step), start=step):
            batch_size = self.crops.phases[self.crops.of_step(number)].batch_size
            metrics = batches.composition(self.config, self.crops, number, batch)
            layout = batches.layout(self.config, batch_size, batch.pixels_BHWc.shape[1:3], number)
            yield [batches.microbatch(batch.pixels_BHWc, layout, self._schedule(number, layout), metrics)]

    def examples(self) -> Sequence[Microbatch]:
        empty = batches.empty_batches(self.config, self.crops, self.model_config.in_channels)
        return [batches.microbatch(pixels, layout, self._schedule(0, layout)) for pixels, layout in empty]

    def whole_batches(self, start: int) -> Iterator[Float[np.ndarray, "B H W c"]]:
        """Crops of the first phase for steps start, start + 1, ..., of all processes."""
        first = dataclasses.replace(self.crops.phases[0], rows=None)
        return (batch.pixels_BHWc for batch in Phases((first,)).from_step(start))

    def _schedule(self, step: int, layout: batches.Layout) -> Schedule | None:
        if self.frozen.features is None or layout.adversarial:
            return None
        return schedule(self.config.alignment, step)

    def evaluate(self, state: TrainState, check_signals: CheckSignals) -> dict[str, float]:
        """Metrics on held-out images: of the EMA as `validation_loss`, of the raw weights as `validation_loss/raw`.

        The other names are `validation_psnr` and those of the terms of the loss, such as `validation_lpips`. With
        kinds, those of each kind follow, such as `validation_psnr/text` and `validation_psnr/text/raw`.
        """
        metrics: dict[str, float] = {}
        for suffix, model in (("", state.ema), ("/raw", state.model)):
            values = self._validate(model, self.frozen, self.validation, check_signals)
            metrics |= validation.report(values, self.validation.kinds, suffix)
        return metrics

    def draw(self, state: TrainState, check_signals: CheckSignals) -> dict[str, Drawing]:
        """One grid of held-out images beside their reconstructions by the EMA."""
        check_signals()
        rebuilt = np.asarray(self._reconstruct(state.ema, self._put(self.drawn)))
        pairs = [
            [over_white(Image.fromarray(to_image(pixels))) for pixels in pair]
            for pair in zip(self.drawn, rebuilt, strict=False)
        ]
        numbered = [f"{number}. record {record}" for number, record in enumerate(self.records, start=1)]
        grid = np.asarray(lay_out(pairs, COLUMNS, numbered, len(COLUMNS)))
        notes = [{"text": None, "record": record} for record in self.records]
        return {"reconstructions": Drawing(grid, {"columns": list(COLUMNS), "samples": notes})}

    def _put(self, images: Float[np.ndarray, "B H W c"]) -> jax.Array:
        """Images on the mesh; the last batch shard is filled up with repetitions."""
        size = sharding.padded_size(self.mesh, len(images))
        rows = [row % len(images) for row in sharding.local_rows(self.mesh, size)]
        return sharding.put_batch(self.mesh, images[rows], size)


def make_task(config: AutoencoderConfig, images: SelectedImages, mesh: Mesh, held_out: float) -> AutoencoderTask:
    """The task of a run.

    Args:
      config: config of the stage.
      images: selected images.
      mesh: devices of the run.
      held_out: `data.held_out` of the config: the fraction of images that only validation reads.

    Raises:
      ValueError: if the crops fit no images, or their number not the mesh.
    """
    model_config = config.model
    with processes.raise_together():
        frozen, digests = networks.load(config.perceptual, config.alignment, mesh)
    with processes.raise_together():
        trained, held = batches.split_held_out(images, held_out)
        held, kinds = validation.choose(config, held)
        drawn = held.subset(range(min(batches.DRAWN_IMAGES, len(held))))
        return AutoencoderTask(
            config=config,
            data={"pictures": trained.digest, **digests},
            frozen=frozen,
            model_config=model_config,
            images=trained,
            crops=make_phases(config, trained, functools.partial(sharding.local_rows, mesh)),
            validation=validation.held_out(config, held, kinds, mesh),
            drawn=batches.drawn_pixels(drawn, model_config.factor),
            records=[image.index for image in drawn.chosen],
            mesh=mesh,
        )


def train_autoencoder(
    config: AutoencoderConfig,
    images: SelectedImages,
    out: pathlib.Path,
    model: pathlib.Path,
    *,
    held_out: float = 0.0,
    accept_changes: bool = False,
    restart: bool = False,
) -> None:
    """Trains the autoencoder and writes its EMA weights, with the statistics of its latents, to the model folder.

    Args:
      config: config of the stage.
      images: selected images.
      out: folder of the run.
      model: model folder.
      held_out: see `make_task`.
      accept_changes: see `loop.train`.
      restart: see `loop.train`.
    """
    mesh = make_mesh(config.mesh)
    task = make_task(config, images, mesh, held_out)
    state = loop.train(task, config, out, mesh, accept_changes=accept_changes, restart=restart)
    step = int(state.step)  # not `train.steps`: a resumed run may already be beyond an end that was brought forward
    del state
    with processes.raise_together():
        trained = contents.weights(out / paths.CHECKPOINTS / str(step), "ema")
    moments: Moments | None = None
    if not config.statistics_batches:
        used = task.images.subset(task.crops.used)
        moments = latent_statistics.of_images(config.model, trained, used, config.statistics_images, mesh, out)
    with processes.raise_together():
        if jax.process_index() == 0:
            vae = stored_weights.load(trained, jax.eval_shape(lambda: VAE(config.model, key=jax.random.key(0))))
            if moments is None:
                unseen = itertools.islice(task.whole_batches(config.train.steps), config.statistics_batches)
                moments = latent_statistics.of_crops(vae, unseen)
            model_folder.save_vae(model, vae, moments.mean, moments.std)


def is_trained(model: pathlib.Path) -> bool:
    """Whether a model folder has an autoencoder."""
    return (model / "vae" / f"{stored_weights.STEM}.safetensors").is_file()


def train_vae(
    config: AutoencoderConfig, images: SelectedImages, out: pathlib.Path, model: pathlib.Path, **options: Any
) -> None:
    """Trains the autoencoder of a job unless the model folder has one; arguments as in `train_autoencoder`."""
    if not is_trained(model):
        train_autoencoder(config, images, out, model, **options)
