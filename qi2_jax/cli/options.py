"""Arguments that several verbs share."""

import argparse

from qi2_jax.runtime import meeting

RESTART = (
    "begin a run anew at step 0 if its checkpoints are gone, instead of refusing; a run that still has checkpoints "
    "resumes as always"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name an experiment and change it."""
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a file such as experiments/demo.py, or experiments/demo.py:tiny"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as transformer.train.steps=100"
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that make a process one of several."""
    group = parser.add_argument_group(
        "several processes",
        "The same command is started once per host, or several times on one; all see the same files. On a TPU pod or "
        "under SLURM --distributed is enough; elsewhere the other three are needed. Devices of `platform` cpu are "
        "divided evenly among --processes.",
    )
    group.add_argument("--distributed", action="store_true", help="find the other processes as the cluster names them")
    group.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0; 0 writes the run")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="host of process 0, and a port that is free there")
    group.add_argument(
        "--join-seconds",
        type=float,
        default=meeting.DEADLINE,
        metavar="S",
        help=f"time to wait for the other processes at --coordinator (default {meeting.DEADLINE:.0f})",
    )


def check_processes(arguments: argparse.Namespace, platform: str) -> int:
    """How many processes the arguments name; 1 where that is left to the cluster.

    Raises:
      ValueError: if they do not say what is needed.
    """
    given = {name: getattr(arguments, name) for name in ("processes", "process", "coordinator")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    count, index = given["processes"], given["process"]
    if not arguments.distributed and 0 < len(missing) < len(given):
        raise ValueError(
            f"of several processes each needs --processes, --process and --coordinator, but {' and '.join(missing)} "
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
