"""`qi2 train EXPERIMENT --samples DIR --out DIR`: the transformer stage of a job, on encoded samples.

`qi2 train EXPERIMENT --data RECORDS --out DIR` trains an autoencoder, on records.
"""

import argparse
import pathlib
from typing import TYPE_CHECKING

from qi2_jax.cli import options

if TYPE_CHECKING:
    from qi2_jax.workflows.config import AutoencoderExperiment, StageExperiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_experiment_arguments(parser)
    parser.add_argument(
        "--samples",
        type=pathlib.Path,
        help="for a transformer: encoded samples, which are the output of `qi2 data cache`, or samples/ of a job",
    )
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="RECORDS",
        help="for an autoencoder: folder of scored records, the output of `qi2 data ingest` and `qi2 data score`",
    )
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        help="model folder, run or job with the encoders that made the samples (default: that of the samples' job); "
        "needed for `qi2 sample` and `qi2 export`",
    )
    parser.add_argument(
        "--start",
        type=pathlib.Path,
        metavar="PATH",
        help="run, checkpoint or imported folder whose transformer to start from, or an adapter file of the "
        "transformer in --model (default: random weights); short for transformer.start.folder=PATH",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run; run again to continue")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue even if config or data changed since the run started; the changes are recorded",
    )
    parser.add_argument("--restart", action="store_true", help=options.RESTART)
    options.add_process_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.runtime import devices, processes

    overrides = list(arguments.overrides)
    if arguments.start is not None:
        overrides.append(f"transformer.start.folder={arguments.start.absolute()}")
    from qi2_jax.workflows.config import AutoencoderExperiment, CurriculumExperiment, load_experiment

    config = load_experiment(arguments.experiment, overrides)
    if isinstance(config, CurriculumExperiment):
        raise ValueError(
            f"{arguments.experiment} is a curriculum; train with the config of a stage, such as "
            "experiments/qwen_image_2/s1_256p_t2i.py, or run all of them with `qi2 run`"
        )
    _check_source(arguments, isinstance(config, AutoencoderExperiment))
    count = options.check_processes(arguments, config.platform)
    training = config.vae if isinstance(config, AutoencoderExperiment) else config.transformer
    devices.set_platform(config, (training.mesh,), count)
    with processes.joined(options.group_of(arguments)):
        devices.set_compilation_cache(config, arguments.out)
        if isinstance(config, AutoencoderExperiment):
            _train_autoencoder(config, arguments)
        else:
            _train(config, arguments)


def _check_source(arguments: argparse.Namespace, is_autoencoder: bool) -> None:
    """Raises a ValueError unless the arguments are those of what the experiment trains."""
    what, needed, others = ("a transformer", "samples", ["data"])
    if is_autoencoder:
        what, needed, others = ("an autoencoder", "data", ["samples", "model"])
    if getattr(arguments, needed) is None:
        raise ValueError(f"{arguments.experiment} trains {what}: name its training data with --{needed}")
    if given := [f"--{name}" for name in others if getattr(arguments, name) is not None]:
        raise ValueError(f"{arguments.experiment} trains {what}, which {' and '.join(given)} is not for; leave it out")


def _train_autoencoder(config: "AutoencoderExperiment", arguments: argparse.Namespace) -> None:
    import jax

    from qi2_jax.cli import tables
    from qi2_jax.runs import paths
    from qi2_jax.runtime import outputs, processes
    from qi2_jax.training.checkpoints import files
    from qi2_jax.workflows import autoencoder, reports

    with processes.raise_together():
        if jax.process_index() == 0 and not files.steps(arguments.out / paths.CHECKPOINTS):
            outputs.check_outside(arguments.out, arguments.data)
    autoencoder.train(
        config,
        arguments.data,
        arguments.out,
        accept_changes=arguments.accept_changes,
        restart=arguments.restart,
        show=tables.show if jax.process_index() == 0 else reports.ignore,
    )


def _train(config: "StageExperiment", arguments: argparse.Namespace) -> None:
    import jax

    from data_pipeline.samples.cache import Cache
    from qi2_jax.runs import locating, paths
    from qi2_jax.runtime import lock, outputs, processes
    from qi2_jax.tasks.transformer import start, task
    from qi2_jax.tasks.transformer.config import check_transformer
    from qi2_jax.training.checkpoints import files

    check_transformer(config)
    source = config.transformer.start.folder
    # Checked before the lock creates the folder. A run that has checkpoints no longer needs its start.
    with processes.raise_together():
        if jax.process_index() == 0 and not files.steps(arguments.out / paths.CHECKPOINTS):
            model = arguments.model and locating.model_of(arguments.model)
            outputs.check_outside(arguments.out, arguments.samples, model, pathlib.Path(source) if source else None)
            if source:
                start.check_source(source, arguments.model)
    samples = Cache(arguments.samples)
    with lock.hold(arguments.out):
        task.train_transformer(
            config,
            samples,
            arguments.out,
            accept_changes=arguments.accept_changes,
            restart=arguments.restart,
            base=arguments.model,
            prepare=lambda: start.prepare_model_folder(config.transformer, samples, arguments.model, arguments.out),
        )
