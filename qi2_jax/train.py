"""`qi2 train EXPERIMENT --samples DIR --out DIR`: only the transformer stage of a job, on samples encoded before."""

import argparse
import pathlib
import sys
from typing import Any

from qi2_jax import cli, processes
from qi2_jax import config as configs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    configs.add_arguments(parser)
    parser.add_argument(
        "--samples", type=pathlib.Path, required=True, help="encoded samples: of `qi2 data cache`, or a job's samples/"
    )
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        help="run, job or model folder with the encoders that made the samples, which `qi2 sample` and `qi2 export` "
        "need; default: that of the job which the samples belong to",
    )
    parser.add_argument(
        "--start",
        type=pathlib.Path,
        metavar="DIR",
        help="run, checkpoint or imported folder with whose transformer a new run begins (default: random weights); "
        "short for transformer.start.folder=DIR",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run; run again to continue")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue although config or data are others than at the run's beginning; what changed is recorded",
    )
    processes.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    cli.listen_to_signals()
    overrides = list(arguments.overrides)
    if arguments.start is not None:
        overrides.append(f"transformer.start.folder={arguments.start.absolute()}")
    config = configs.load(arguments.experiment, overrides)
    if "transformer" not in config:
        raise ValueError(
            f"{arguments.experiment} has no group `transformer`; train with the config of a stage, such as "
            "experiments/qwen_image_2/s1_256p_t2i.py, or run all of them with `qi2 run`"
        )
    count = processes.check(arguments, config.platform)
    configs.set_platform(config, (config.transformer.mesh,), count)
    with processes.joined(arguments):
        configs.set_compilation_cache(config, arguments.out)
        _train(config, arguments)


def _train(config: Any, arguments: argparse.Namespace) -> None:
    import jax

    from data_pipeline.cache import Cache
    from qi2_jax import lock, runs
    from qi2_jax.job import stages, transformer
    from qi2_jax.training import checkpoint

    stages.check_transformer(config.transformer, config.data)
    samples = Cache(arguments.samples)
    source = config.transformer.start.folder
    with processes.agreed():  # before the lock, which makes the folder; a run that has begun needs it no more
        if jax.process_index() == 0 and source and not checkpoint.steps(arguments.out / runs.CHECKPOINTS):
            runs.locate(source)
    with lock.hold(arguments.out):
        with processes.agreed():
            transformer.check_samples(config, samples)
            if jax.process_index() == 0:
                transformer.give_model(config.transformer, samples, arguments.model, arguments.out)
        transformer.train_transformer(config, samples, arguments.out, accept_changes=arguments.accept_changes)


if __name__ == "__main__":
    cli.main(["train", *sys.argv[1:]])
