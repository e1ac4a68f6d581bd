"""Groups of a run's config that experiments share. Arguments replace their default values."""

from typing import Any


def train(steps: int, **changes: Any) -> dict[str, Any]:
    """How long a run trains, and what it reports."""
    group = dict(
        steps=steps,
        # Updates that are dispatched before the current one is done. If an update takes seconds, 0 costs nothing, and
        # SIGTERM can interrupt one between two microbatches.
        ahead=2,
        log_every=10,
        max_skipped=10,  # updates in a row with a loss or gradient that is not finite, after which the run ends
        watchdog_seconds=0.0,  # a step that takes longer ends the process with a non-zero status; 0: never
        sinks=("tensorboard",),  # besides metrics.jsonl; also "wandb"
    )
    return group | changes


def checkpoint(every: int, **changes: Any) -> dict[str, Any]:
    """Which checkpoints are saved and kept, see `qi2_jax.training.checkpoints.retention.Policy`."""
    group = dict(
        every=every,
        keep=2,
        keep_every=0,
        keep_best=0,
        best_metric="validation_loss",  # a plain mean over streams; "validation_loss/ema/STREAM" is that of one stream
        checksums=True,
        local_every=0,  # steps between two checkpoints on each host's disk; 0: none
        local_folder="",  # an absolute path on that disk
    )
    return group | changes


def samples(every: int = 0, **changes: Any) -> dict[str, Any]:
    """Grids of images that the EMA weights generate during training: from held-out samples, and from fixed prompts."""
    group = dict(
        every=every,
        count=4,  # held-out samples of each stream
        steps=20,
        guidance=1.0,
        seed=0,
        prompts=(),  # texts of prompts
        edits=(),  # each an instruction and the paths of one to three condition images: ("make it night", "day.png")
    )
    return group | changes


def text_slots(**changes: Any) -> dict[str, Any]:
    """How batches are formed by the lengths of their texts; by default, all are padded to the longest one."""
    group = dict(
        layouts=1,  # at most this many numbers of text slots for each stream, each with a program of its own
        window=1,  # batches whose samples are sorted together by length
        pieces=1,  # parts of a batch, each with texts of one length; best as many as a batch has microbatches
    )
    return group | changes


def profile() -> dict[str, int]:
    """A trace of `steps` steps from step `start` on; with 0, SIGUSR1 starts it."""
    return dict(start=0, steps=3)


def timesteps(**changes: Any) -> dict[str, Any]:
    """The distribution of training times, and the one time shift that training, validation and sampling share."""
    group = dict(
        law="logit_normal",
        logit_normal=dict(mean=0.0, std=1.0),  # arguments of the distribution with this name
        uniform=dict(low=0.0, high=1.0),
        shift=dict(
            dynamic=True,
            base_tokens=256,
            max_tokens=8192,
            base_shift=0.5,
            max_shift=0.9,
            kind="exponential",
            shift=1.0,  # the shift if it is not dynamic
        ),
    )
    return group | changes


def start() -> dict[str, str]:
    """The run, checkpoint or imported folder whose transformer a new run starts from; "": random weights."""
    return dict(folder="")


def lora() -> dict[str, Any]:
    """A low-rank adapter that is trained instead of the whole transformer, which `start` must then name; rank 0: none.

    Its change is scaled by alpha / rank. Programs that ignore the header of an adapter assume that both are equal.
    """
    return dict(rank=0, alpha=16.0, targets=("blocks.attn.*", "blocks.mlp.*"))
