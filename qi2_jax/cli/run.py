"""`qi2 run EXPERIMENT --out DIR`: a whole job."""

import argparse
import pathlib

from qi2_jax.cli import options
from qi2_jax.config import loading as configs
from qi2_jax.runtime import devices, processes, signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the job; run again to continue")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        help="images beside .txt captions, or with a metadata.jsonl; of a curriculum, a folder of scored records. "
        "Default: a demo set",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="of a curriculum: go on although the config is not that of its beginning; what is made already stays, "
        "and what it could not go on with is refused",
    )
    parser.add_argument("--restart", action="store_true", help=options.RESTART)
    options.add_process_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    signals.listen_to_signals()
    config = configs.load(arguments.experiment, arguments.overrides)
    if "stages" in config:
        from qi2_jax.tasks import keys

        keys.check("", config, keys.CURRICULUM, ("compilation_cache",))
        count = options.check_processes(arguments, config.platform)
        parts = [part for stage in config.stages.values() for part in (stage.encode, stage.transformer)]
        devices.set_platform(config, [part.mesh for part in (config.vae, *parts)], count)
        with processes.joined(arguments):
            from qi2_jax.workflows import curriculum

            devices.set_compilation_cache(config, arguments.out)
            curriculum.run(
                config,
                arguments.out,
                arguments.data,
                accept_changes=arguments.accept_changes,
                restart=arguments.restart,
            )
        return
    if arguments.accept_changes:
        raise ValueError(f"--accept-changes is for a curriculum, which {arguments.experiment} is not")
    if arguments.distributed or options.check_processes(arguments, config.platform) > 1:
        raise ValueError(f"{arguments.experiment} is a job of one process; a curriculum and `qi2 train` take several")
    if not {"encode", "vae", "transformer"} <= {*config}:
        raise ValueError(
            f"{arguments.experiment} is no whole job: it lacks {sorted({'encode', 'vae', 'transformer'} - {*config})}. "
            "A stage is trained by `qi2 train`, or in its turn by `qi2 run experiments/qwen_image_2/curriculum.py`"
        )
    devices.set_platform(config, (config.encode.mesh, config.vae.mesh, config.transformer.mesh))
    from qi2_jax.workflows import demo as job

    devices.set_compilation_cache(config, arguments.out)
    job.run(config, arguments.out, arguments.data, restart=arguments.restart)
