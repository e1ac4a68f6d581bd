"""Groups of a training stage's config that experiments share; each takes what it wants otherwise as arguments."""

from typing import Any


def train(steps: int, **changes: Any) -> dict[str, Any]:
    """How long a stage trains and what it tells."""
    group = dict(
        steps=steps,
        # Updates that are dispatched before the one under way is done. Where one takes seconds, 0 costs nothing, and
        # SIGTERM ends one between two of its parts.
        ahead=2,
        log_every=10,
        max_skipped=10,  # updates in a row that are not finite end a run
        watchdog_seconds=0.0,  # a step that takes longer ends the process with a status that is not 0; 0: never
        sinks=("tensorboard",),  # beside metrics.jsonl; also "wandb"
    )
    return group | changes


def checkpoint(every: int, **changes: Any) -> dict[str, Any]:
    """Which checkpoints are saved and kept, see `qi2_jax.training.retention.Policy`."""
    group = dict(
        every=every,
        keep=2,
        keep_every=0,
        keep_best=0,
        best_metric="validation_loss",  # a plain mean over streams; of one alone "validation_loss/ema/STREAM"
        checksums=True,
        local_every=0,  # in between on each host's own disk, every so many steps; 0: never
        local_folder="",  # there, an absolute path
    )
    return group | changes


def samples(every: int = 0, **changes: Any) -> dict[str, Any]:
    """Grids drawn from the averaged weights while training: of validation's samples, and of fixed prompts and edits."""
    group = dict(
        every=every,
        count=4,  # of validation's samples of each stream
        steps=20,
        guidance=1.0,
        seed=0,
        prompts=(),  # texts
        edits=(),  # each an instruction and the paths of one to three condition images: ("make it night", "day.png")
    )
    return group | changes


def profile() -> dict[str, int]:
    """A trace of so many steps from step `start` on; 0: only when SIGUSR1 asks for one."""
    return dict(start=0, steps=3)


def timesteps(**changes: Any) -> dict[str, Any]:
    """The law of training times and the one shift with resolution, which training, validation and sampling share."""
    group = dict(
        law="logit_normal",
        logit_normal=dict(mean=0.0, std=1.0),  # read where the law is named so
        uniform=dict(low=0.0, high=1.0),
        shift=dict(
            dynamic=True,
            base_tokens=256,
            max_tokens=8192,
            base_shift=0.5,
            max_shift=0.9,
            kind="exponential",
            shift=1.0,  # read where it is not dynamic
        ),
    )
    return group | changes


def start() -> dict[str, str]:
    """The run, checkpoint or imported folder with whose transformer a new run begins; empty: random weights."""
    return dict(folder="")


def lora() -> dict[str, Any]:
    """A low-rank adapter, trained instead of the whole transformer, which `start` must then name; rank 0: none.

    Its change is scaled by alpha / rank; programs that read an adapter without its header take both for equal.
    """
    return dict(rank=0, alpha=16.0, targets=("blocks.attn.*", "blocks.mlp.*"))
