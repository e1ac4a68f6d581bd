"""`qi2 run EXPERIMENT --out DIR`: a whole job."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from qi2_jax.cli import options

if TYPE_CHECKING:
    from qi2_jax.workflows.config import CurriculumExperiment, DemoExperiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_experiment_arguments(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the job; run again to continue")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        help="images beside .txt captions, or with a metadata.jsonl; for a curriculum, a folder of scored records. "
        "Default: a demo set",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="for a curriculum: continue even if the config changed since it started. Finished parts stay as they are; "
        "changes that do not fit them are refused",
    )
    parser.add_argument("--restart", action="store_true", help=options.RESTART)
    options.add_process_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.runs import paths
    from qi2_jax.runtime import outputs
    from qi2_jax.workflows.config import CurriculumExperiment, DemoExperiment, load_experiment

    config = load_experiment(arguments.experiment, arguments.overrides)
    if not any((arguments.out / name).is_file() for name in (paths.JOB, paths.CURRICULUM)):
        outputs.check_outside(arguments.out, arguments.data)
    if isinstance(config, CurriculumExperiment):
        _run_curriculum(config, arguments)
    elif arguments.accept_changes:
        raise ValueError(f"--accept-changes is for a curriculum, which {arguments.experiment} is not")
    elif isinstance(config, DemoExperiment):
        _run_demo(config, arguments)
    else:
        raise ValueError(
            f"{arguments.experiment} is a single stage, not a whole job: train it with `qi2 train`, or as part of "
            "`qi2 run experiments/qwen_image_2/curriculum.py`"
        )


def _run_curriculum(config: "CurriculumExperiment", arguments: argparse.Namespace) -> None:
    from qi2_jax.cli import tables
    from qi2_jax.runtime import devices, processes

    count = options.check_processes(arguments, config.platform)
    parts = [part for stage in config.stages.values() for part in (stage.encode, stage.transformer)]
    devices.set_platform(config, [part.mesh for part in (config.vae, *parts)], count)
    with processes.joined(options.group_of(arguments)):
        from qi2_jax.workflows import curriculum

        devices.set_compilation_cache(config, arguments.out)
        curriculum.run(
            config,
            arguments.out,
            arguments.data,
            accept_changes=arguments.accept_changes,
            restart=arguments.restart,
            show=tables.show,
        )


def _run_demo(config: "DemoExperiment", arguments: argparse.Namespace) -> None:
    from qi2_jax.cli import tables
    from qi2_jax.runtime import devices

    if arguments.distributed or options.check_processes(arguments, config.platform) > 1:
        raise ValueError(f"{arguments.experiment} runs in one process; a curriculum and `qi2 train` can use several")
    devices.set_platform(config, (config.encode.mesh, config.vae.mesh, config.transformer.mesh))
    from qi2_jax.workflows import demo

    devices.set_compilation_cache(config, arguments.out)
    demo.run(config, arguments.out, arguments.data, restart=arguments.restart, show=tables.show)
