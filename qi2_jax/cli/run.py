"""`qi2 run EXPERIMENT --out DIR`: a whole job."""

import argparse
import pathlib
from typing import Any

from qi2_jax.cli import options


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
    options.add_process_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.config import loading

    config = loading.load(arguments.experiment, arguments.overrides)
    if "stages" in config:
        _run_curriculum(config, arguments)
    else:
        _run_demo(config, arguments)


def _run_curriculum(config: Any, arguments: argparse.Namespace) -> None:
    from qi2_jax.runtime import devices, processes
    from qi2_jax.tasks import keys

    keys.check("", config, keys.CURRICULUM, ("compilation_cache",))
    count = options.check_processes(arguments, config.platform)
    parts = [part for stage in config.stages.values() for part in (stage.encode, stage.transformer)]
    devices.set_platform(config, [part.mesh for part in (config.vae, *parts)], count)
    with processes.joined(options.group_of(arguments)):
        from qi2_jax.workflows import curriculum

        devices.set_compilation_cache(config, arguments.out)
        curriculum.run(config, arguments.out, arguments.data, accept_changes=arguments.accept_changes)


def _run_demo(config: Any, arguments: argparse.Namespace) -> None:
    from qi2_jax.runtime import devices

    if arguments.accept_changes:
        raise ValueError(f"--accept-changes is for a curriculum, which {arguments.experiment} is not")
    if arguments.distributed or options.check_processes(arguments, config.platform) > 1:
        raise ValueError(
            f"{arguments.experiment} is a job for one process; curricula and `qi2 train` accept several processes"
        )
    if missing := sorted({"encode", "vae", "transformer"} - {*config}):
        raise ValueError(
            f"{arguments.experiment} is not a whole job: it has no {', '.join(missing)}. Train a single stage with "
            "`qi2 train`, or all of them with `qi2 run experiments/qwen_image_2/curriculum.py`"
        )
    devices.set_platform(config, (config.encode.mesh, config.vae.mesh, config.transformer.mesh))
    from qi2_jax.workflows import demo

    devices.set_compilation_cache(config, arguments.out)
    demo.run(config, arguments.out, arguments.data)
