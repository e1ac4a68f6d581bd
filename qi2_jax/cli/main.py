"""The command line: `qi2 VERB`; `python -m qi2_jax VERB` is the same."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from qi2_jax.runtime import signals
from qi2_jax.runtime.errors import TRACEBACK, explain

VERBS = {
    "run": "run a whole job or a curriculum: data, autoencoder, transformer, export",
    "data": "prepare data, step by step: ingest or synth, score, select, cache, report",
    "train": "train the transformer of a job on its encoded samples",
    "report": "draw a page about a run or about all runs of a folder: curves, events, samples",
    "sample": "generate images from texts",
    "edit": "generate an image from a text and condition images",
    "import": "turn a published diffusers folder into a model folder",
    "checkpoints": "list, inspect, verify and mark the checkpoints of a run",
    "export": "turn a run, checkpoint or model folder into a diffusers folder",
}

RESUMABLE = frozenset({"run", "train"})  # save after a signal, and continue when the same command runs again


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses a command and runs its verb; errors that users can mend are printed without a traceback.

    Args:
      arguments: the command; None: that of this process, which then also handles signals.
    """
    if arguments is None:
        signals.listen(interruptible=True, resumable=not RESUMABLE.isdisjoint(sys.argv[1:2]))
    with signals.ending():  # Ctrl-C while libraries are imported shows no traceback either
        _run(arguments)


def _run(arguments: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="qi2",
        description="JAX/TPU trainer for the Qwen-Image-2 family.",
        allow_abbrev=False,
        epilog=f"{TRACEBACK}=1 in the environment shows where in the source an error came from.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # Only the verb that is asked for is imported: the others' libraries take seconds to load.
    chosen = next((argument for argument in arguments if argument in VERBS), None)
    module = None
    for verb, purpose in VERBS.items():
        sub = verbs.add_parser(
            verb, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", allow_abbrev=False
        )
        if verb == chosen:
            module = importlib.import_module(_module(verb))
            module.add_arguments(sub)
    # argparse takes KEY=VALUE only directly behind the experiment; they are as welcome behind the options.
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(parsed, "overrides") and all("=" in item and item[0] != "-" for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    assert module is not None
    try:
        with signals.ending():
            module.main(parsed)
    except Exception as error:
        if text := explain(parsed.verb, error):
            raise SystemExit(text) from error
        raise


def _module(verb: str) -> str:
    return "qi2_jax.cli." + ("import_" if verb == "import" else verb)
