"""Checks of a curriculum before any work is done: what a later stage would refuse is refused at the start."""

import pathlib
from typing import Any

from qi2_jax.config.changes import differences
from qi2_jax.interop import folder
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.tasks.autoencoder import networks
from qi2_jax.tasks.autoencoder.config import check_autoencoder
from qi2_jax.tasks.autoencoder.task import is_trained
from qi2_jax.tasks.transformer.config import check_transformer
from qi2_jax.workflows.changes import is_started
from qi2_jax.workflows.config import CurriculumExperiment, StageExperiment


def check_curriculum(config: CurriculumExperiment, out: pathlib.Path) -> None:
    """Checks a curriculum against this machine and existing results.

    Raises:
      ValueError: naming what a later step would refuse.
    """
    for name, stage in config.stages.items():
        try:
            stage.encode.check()
            check_transformer(stage)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None
    if not is_started(out, config.order[0]):  # later its start is not needed
        _check_start(config)
    _check_one_model(config)
    _check_model(config, out)


def _check_start(config: CurriculumExperiment) -> None:
    first = config.order[0]
    if (rank := config.stages[first].transformer.lora.rank) and not config.start.folder:
        raise ValueError(
            f"stages.{first}.transformer.lora.rank is {rank}: name the transformer to adapt with start.folder"
        )
    if config.start.folder:
        locating.locate(config.start.folder)


def _check_one_model(config: CurriculumExperiment) -> None:
    """Each stage starts from the weights of the one before it, and one time shift is exported with them."""

    def model_of(stage: StageExperiment) -> dict[str, Any]:
        typed = stage.transformer.as_typed
        return {"model": typed["model"], "timesteps": {"shift": typed["timesteps"]["shift"]}}

    (first, expected), *others = [(name, model_of(stage)) for name, stage in config.ordered.items()]
    for name, other in others:
        if changes := differences(expected, other):
            raise ValueError(
                f"stages.{name}.transformer differs from stages.{first}: {'; '.join(map(str, changes))}. All stages "
                "train one model with one time shift; give them the same values"
            )


def _check_model(config: CurriculumExperiment, out: pathlib.Path) -> None:
    if config.model.folder:
        if not (locating.model_of(pathlib.Path(config.model.folder)) / folder.MARK).is_file():
            existing = out / paths.MODEL
            here = f", or continue with model.folder={existing}" if (existing / folder.MARK).is_file() else ""
            raise ValueError(f"model.folder {config.model.folder} is not a model folder; `qi2 import` makes one{here}")
    elif config.platform != "cpu" and not config.encoder.folder:
        raise ValueError(
            "name the condition encoder with model.folder or encoder.folder: a random one is for CPUs only"
        )
    else:
        model_folder.check_encoder(config.encoder, out / paths.MODEL)
        check_autoencoder(config.vae)
        if not is_trained(out / paths.MODEL):
            networks.check_folders(config.vae.perceptual, config.vae.alignment)
