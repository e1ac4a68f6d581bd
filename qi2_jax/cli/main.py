"""The command line: `qi2 VERB`; `python -m qi2_jax VERB` is the same.

A verb's file declares its arguments without importing the libraries that its work needs, so that `--help` and mistakes
in the arguments are answered at once. Its functions import them when they run.
"""

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from qi2_jax.cli import options
from qi2_jax.runtime import logs, signals
from qi2_jax.runtime.errors import TRACEBACK, explain

VERBS = {
    "run": "run a whole job or a curriculum: data, autoencoder, transformer, export",
    "data": "prepare data, step by step: ingest or synth, score, select, cache, report",
    "plan": "compile a stage for a TPU pod on this machine: memory, FLOPs, collectives, time, cost",
    "train": "train one part of a job: the transformer on encoded samples, or the autoencoder on records",
    "report": "draw a page about a run or about all runs of a folder: curves, events, samples",
    "eval": "judge trained models: `eval vae` compares autoencoders by their reconstructions",
    "sample": "generate images from prompts",
    "edit": "generate images from prompts and condition images",
    "import": "convert a published diffusers folder to a model folder, or the weights of LPIPS to a folder",
    "checkpoints": "list, inspect, verify and mark the checkpoints of a run",
    "launch": "submit a training to GKE, Cloud TPU queued resources or Slurm, or scoring to Dataflow",
    "export": "convert a run, checkpoint or model folder to a diffusers folder",
}
# Commands that keep their work after a signal, and continue when the same command runs again.
RESUMABLE = (("run",), ("train",), ("data", "score"), ("data", "cache"))


class _Version(argparse.Action):
    """Prints the versions. It reads them from the packages' metadata, because importing JAX takes a second."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the versions of qi2, jax and Python")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("qi2", "jax")]
        print(", ".join([*versions, f"Python {platform.python_version()}"]))
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses a command and runs its verb. Prints errors that users can fix without a traceback.

    Args:
      arguments: command-line arguments; None: those of this process, which then also handles signals.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        words = tuple(word for word in arguments if not word.startswith("-"))
        signals.listen(interruptible=True, resumable=any(words[: len(names)] == names for names in RESUMABLE))
    verb = next((argument for argument in arguments if argument in VERBS), None)
    try:
        signals.stopped_status()  # a wrong value is an error before the work, not at its end
        with signals.ending():  # also while libraries are imported
            parsed, module = _parse(list(arguments), verb)
            logs.set_up(parsed.log_level)
            module.main(parsed)
    except Exception as error:
        if text := explain(verb or "", error):
            raise SystemExit(text) from error
        raise


def _parse(arguments: list[str], chosen: str | None) -> tuple[argparse.Namespace, ModuleType]:
    parser = argparse.ArgumentParser(
        prog="qi2",
        description="JAX/TPU trainer for the Qwen-Image-2 family.",
        allow_abbrev=False,
        epilog=f"Environment: {TRACEBACK}=1 shows the traceback of every error; {logs.LEVEL}=LEVEL chooses which "
        f"messages are printed ({', '.join(logs.LEVELS)}); {signals.STOPPED_STATUS}=N is the exit status of `run`, "
        "`train`, `data score` and `data cache` after SIGTERM (default 0).",
    )
    parser.add_argument("--version", action=_Version)
    parser.set_defaults(log_level=None)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    module = None
    for verb, purpose in VERBS.items():
        sub = options.add_verb(verbs, verb, purpose)
        if verb == chosen:
            module = importlib.import_module("qi2_jax.cli." + ("import_" if verb == "import" else verb))
            module.add_arguments(sub)
    # argparse accepts KEY=VALUE only directly after the experiment; users also write it after the options.
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "overrides") and all("=" in item and item[0] != "-" for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    assert module is not None
    return parsed, module
