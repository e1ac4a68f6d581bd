"""Arguments that several verbs share."""

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from qi2_jax.runtime import meeting

if TYPE_CHECKING:
    from qi2_jax.workflows.config import AutoencoderExperiment, StageExperiment

RESTART = "if all checkpoints of a run are gone, start it over from step 0; runs that have checkpoints resume as usual"


def add_verb(verbs: Any, name: str, purpose: str) -> argparse.ArgumentParser:
    """Adds a verb or the step of a verb, with the options that all of them have.

    Args:
      verbs: subparsers that receive the verb.
      name: name that the user types.
      purpose: imperative sentence without its capital letter and full stop.
    """
    description = f"{purpose[0].upper()}{purpose[1:]}."
    parser = verbs.add_parser(name, help=purpose, description=description, allow_abbrev=False)
    for flag, level, text in (("-v", "debug", "print more messages"), ("-q", "warning", "print warnings only")):
        long = "--verbose" if flag == "-v" else "--quiet"
        parser.add_argument(
            flag, long, dest="log_level", action="store_const", const=level, default=argparse.SUPPRESS, help=text
        )
    return parser


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name an experiment and change its config."""
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a file such as experiments/demo.py, or experiments/demo.py:tiny"
    )
    add_overrides(parser, "transformer.train.steps=100")


def load_trained(arguments: argparse.Namespace) -> "StageExperiment | AutoencoderExperiment":
    """The experiment of a single training.

    Raises:
      ValueError: for a whole job or a curriculum, and as `load_experiment`.
    """
    from qi2_jax.workflows.config import AutoencoderExperiment, StageExperiment, load_experiment

    config = load_experiment(arguments.experiment, arguments.overrides)
    if not isinstance(config, StageExperiment | AutoencoderExperiment):
        raise ValueError(
            f"{arguments.experiment} is several trainings; take its stages one after the other, such as "
            "experiments/qwen_image_2/s1_256p_t2i.py"
        )
    return config


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds KEY=VALUE, which changes a config."""
    # Without a default, argparse lists an optional argument as required.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help=f"changes to the config, such as {example}"
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that make this process one of several."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command once per host, or several times on one host; all must see the same files. On a TPU pod "
        "or under SLURM, --distributed is enough. Elsewhere give --processes, --process and --coordinator. With "
        "`platform` cpu, --processes divide the devices of the mesh evenly.",
    )
    group.add_argument("--distributed", action="store_true", help="find the other processes through the cluster")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument(
        "--process", type=int, metavar="I", help="index of this process, from 0; process 0 writes the run's files"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="host of process 0 and a free port on it")
    group.add_argument(
        "--join-seconds",
        type=float,
        default=meeting.DEADLINE,
        metavar="S",
        help=f"time to wait for the other processes at --coordinator (default {meeting.DEADLINE:.0f})",
    )


def group_of(arguments: argparse.Namespace) -> meeting.Group:
    """Returns the group of processes that this one joins."""
    names = ("verb", "coordinator", "processes", "process", "distributed", "join_seconds")
    return meeting.Group(**{name: getattr(arguments, name) for name in names})


def check_processes(arguments: argparse.Namespace, platform: str) -> int:
    """Returns the number of processes, or 1 if the cluster decides it.

    Raises:
      ValueError: if an argument is missing or out of range.
    """
    values = {name: getattr(arguments, name) for name in ("processes", "process", "coordinator")}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    count, index = values["processes"], values["process"]
    if not arguments.distributed and 0 < len(missing) < len(values):
        raise ValueError(
            f"each of several processes needs --processes, --process and --coordinator, but {' and '.join(missing)} "
            "is missing; on a TPU pod or under SLURM give --distributed instead"
        )
    if count is not None and count < 1:
        raise ValueError(f"--processes is {count}; it must be at least 1")
    if index is not None and not 0 <= index < (count or index + 1):
        raise ValueError(f"--process is {index}; with --processes {count} it is one of 0 to {(count or 1) - 1}")
    if arguments.coordinator is not None:
        meeting.parse_address(arguments.coordinator)
    if not 0 < arguments.join_seconds <= 86400:
        raise ValueError(f"--join-seconds is {arguments.join_seconds}; it must be above 0 and at most 86400 (a day)")
    if arguments.distributed and platform == "cpu" and count is None:
        raise ValueError("with platform 'cpu' --distributed needs --processes N too: they share the mesh's devices")
    return count or 1


def output_file(text: str) -> pathlib.Path:
    """A file to write after the work: the type of `--json`, so that a missing folder is an error before the work."""
    path = pathlib.Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, or its folder does not exist; name a file in a folder")
    return path
