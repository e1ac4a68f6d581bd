"""Which checkpoints are kept: the most recent, one per interval, the best, and marked ones. Does not import JAX."""

import dataclasses
import pathlib

from qi2_jax.training.checkpoints import checksums, files


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a run keeps its checkpoints.

    Attributes:
      keep: number of most recent checkpoints to keep, at least 1.
      keep_every: interval in steps; checkpoints at its multiples are kept for ever. 0: none.
      keep_best: number of checkpoints with the lowest `best_metric` to keep. 0: none.
      best_metric: name of a metric in the manifest; a checkpoint without it is never among the best.
        "validation_loss" is a plain mean over streams, however many samples each has.
      checksums: whether files are hashed after each save and compared before each restore.
      local_every: interval in steps at which every process also keeps its part of the state on its host's disk;
        0: never.
      local_folder: folder of the local checkpoints, the same path on every host; see `local.py`.
    """

    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "validation_loss"
    checksums: bool = True
    local_every: int = 0
    local_folder: str = ""

    def __post_init__(self) -> None:
        for key, least in (("keep", 1), ("keep_every", 0), ("keep_best", 0), ("local_every", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least {least}")
        if self.keep_best and not self.best_metric:
            raise ValueError(f"keep_best is {self.keep_best}, but best_metric names no metric")
        if self.local_every and not pathlib.PurePath(self.local_folder).is_absolute():
            raise ValueError(
                f"local_every is {self.local_every}, but local_folder {self.local_folder!r} is not an absolute path; "
                "name a folder on each host's disk"
            )


def reasons(directory: pathlib.Path, policy: Policy) -> dict[int, list[str]]:
    """Why each complete step of a folder is kept; an empty list if no rule keeps it.

    The newest checkpoint with complete checksums is always kept, because newer ones may turn out to be damaged.
    """
    steps = files.steps(directory)
    kept: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-policy.keep :]:
        kept[step].append("latest")
    for step in steps:
        if policy.keep_every and step % policy.keep_every == 0:
            kept[step].append(f"every {policy.keep_every}")
    if policy.keep_best:
        values = {step: files.metric(directory / str(step), policy.best_metric) for step in steps}
        ranked = sorted((value, -step) for step, value in values.items() if value is not None)
        for _, negative in ranked[: policy.keep_best]:
            kept[-negative].append("best")
    for step in files.marked(directory) & kept.keys():
        kept[step].append("marked")
    verified = next((step for step in reversed(steps) if checksums.is_verified(directory / str(step))), None)
    if verified is not None and not kept[verified]:
        kept[verified].append("newest verified")
    return kept


def apply(directory: pathlib.Path, policy: Policy) -> list[int]:
    """Deletes the checkpoints that no retention rule keeps, oldest first, and returns their steps."""
    doomed = [step for step, why in sorted(reasons(directory, policy).items()) if not why]
    return [step for step in doomed if files.remove(directory, step)]
