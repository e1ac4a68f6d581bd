"""Which keys of a curriculum's config may change when it continues, and what must be deleted for others."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from qi2_jax.config import recorded
from qi2_jax.config.changes import is_changeable, is_within
from qi2_jax.inference.encoders import digests
from qi2_jax.runs import locating, paths
from qi2_jax.training.checkpoints import files
from qi2_jax.workflows.config import CurriculumExperiment

# Groups of a stage's config on which its samples depend, and of its `transformer` those on which the model depends.
MAKES_SAMPLES, MAKES_A_MODEL = ("data", "encode"), ("model", "timesteps.shift", "lora")
RECORDS = "records"  # recorded beside the config; records that moved are the same ones, which digests check


@dataclasses.dataclass(frozen=True)
class MayChange:
    """Whether a key may change, because no result depends on it, or none exists yet.

    Attributes:
      free: keys and groups that may change, beyond those whose fields are declared changeable.
      frozen: groups that may not, although their fields are declared changeable.
    """

    free: tuple[str, ...]
    frozen: tuple[str, ...] = ()

    def __call__(self, key: str) -> bool:
        if _is_within_any(key, self.free):
            return True
        return not _is_within_any(key, self.frozen) and is_changeable(CurriculumExperiment, key)


def is_started(out: pathlib.Path, name: str) -> bool:
    """Whether the stage of that name has a checkpoint."""
    return bool(files.steps(_run_of(out, name) / paths.CHECKPOINTS))


def may_change(config: CurriculumExperiment, out: pathlib.Path) -> MayChange:
    """The keys that may differ from the recorded config of a curriculum.

    Raises:
      ValueError: if a stage has a checkpoint, but the stage before it has none.
    """
    free, frozen = [RECORDS], []
    if not (out / paths.CORPUS).exists():
        free.append("corpus")
    if not (out / paths.MODEL).exists():
        free += ["encoder", "model"]
    elif config.model.folder:
        free += ["encoder", "vae"]  # which are not read
        if _is_moved(config, out):
            free.append("model")
    if not files.steps(out / paths.VAE / paths.CHECKPOINTS) and not (out / paths.MODEL / "vae").exists():
        free.append("vae")
    started = started_stages(config, out)
    for name, next_started in zip(started, [*list(started.values())[1:], False], strict=True):
        if not (out / paths.STAGES / name).exists():
            free.append(f"stages.{name}")
        if not started[name]:
            free.append(f"stages.{name}.transformer")
        elif next_started:  # the next stage started from the end of this one
            frozen.append(f"stages.{name}.transformer.train")
    count = sum(started.values())
    if count == 0 or paths.order_of(out)[:count] == list(config.order[:count]):  # other stages may follow those
        free.append("order")
    return MayChange(tuple(free), tuple(frozen))


def started_stages(config: CurriculumExperiment, out: pathlib.Path) -> dict[str, bool]:
    """Whether each stage has a checkpoint, by name, in the order in which they are trained.

    Raises:
      ValueError: if a stage has a checkpoint, but the stage before it has none: it started from weights that are gone,
        or from those of another stage.
    """
    started = {name: is_started(out, name) for name in config.order}
    count = next((number for number, is_one in enumerate(started.values()) if not is_one), len(started))
    later = ", ".join(str(_run_of(out, name)) for name in config.order[count:] if started[name])
    if not later:
        return started
    old, new, lost = paths.order_of(out), list(config.order), config.order[count]
    if old[: count + 1] != new[: count + 1] and old:
        raise ValueError(
            f"order: {old} -> {new}: {lost}, which has no checkpoint, would come before stages that have one; restore "
            f"the order, or let those stages start again (delete {later})"
        )
    raise ValueError(
        f"stage {lost} has no checkpoint, but later stages have, which started from its weights (delete {later}, or "
        f"restore {_run_of(out, lost)} from a copy)"
    )


def check_accepted(config: CurriculumExperiment, out: pathlib.Path, typed: dict[str, Any], allowed: MayChange) -> None:
    """Checks changes that the user accepts before they are recorded.

    Args:
      config: new config.
      out: folder of the curriculum.
      typed: new config in the form in which it is recorded.
      allowed: keys that may change even without being accepted.

    Raises:
      ValueError: if existing results could not continue with the changes, or would not form one model. The message says
        what to delete for each change.
    """
    made = _made_from(config, out)
    shares = tuple(f"stages.{name}.data.mixture" for name in config.order)  # samples do not depend on these
    refused = [
        f"{change} (delete {', '.join(map(str, folders))})"
        for change in recorded.changes_since(out / paths.CURRICULUM, typed)
        for group, folders in made.items()
        if is_within(change.key, group) and not allowed(change.key) and not _is_within_any(change.key, shares)
    ]
    if refused:
        raise ValueError(
            f"{out} cannot continue with these changes; revert them, or delete what was made with the old values:\n  "
            + "\n  ".join(refused)
        )


def _made_from(config: CurriculumExperiment, out: pathlib.Path) -> dict[str, Sequence[pathlib.Path]]:
    """The folders that were made from a group or key of the config, and from these in turn."""
    old, new = paths.order_of(out), list(config.order)
    same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))

    def trained(names: Iterable[str]) -> list[pathlib.Path]:
        return [run for name in dict.fromkeys(names) if (run := _run_of(out, name)).exists()]

    made: dict[str, Sequence[pathlib.Path]] = {
        "corpus": [out / paths.CORPUS, out / paths.STAGES],
        "encoder": [out / paths.MODEL, out / paths.STAGES],
        "model": [out / paths.MODEL, out / paths.STAGES],
        "vae.model": [out / paths.VAE, out / paths.MODEL, out / paths.STAGES],
        "vae.channels": [out / paths.VAE, out / paths.MODEL, out / paths.STAGES],
        "order": trained([*old[same:], *new[same:]]),
    }
    for number, name in enumerate(new, start=1):
        later = trained(new[number:])
        made |= {f"stages.{name}.{group}": [out / paths.STAGES / name, *later] for group in MAKES_SAMPLES}
        made |= {f"stages.{name}.transformer.{group}": [_run_of(out, name), *later] for group in MAKES_A_MODEL}
        if later:
            made[f"stages.{name}.transformer.train.steps"] = later
    return made


def _is_moved(config: CurriculumExperiment, out: pathlib.Path) -> bool:
    """Whether `model.folder` changed, but contains the same models as the folder that is used."""
    record = recorded.read(out / paths.CURRICULUM) if (out / paths.CURRICULUM).is_file() else {}
    if record.get("model", {}).get("folder") == config.model.folder:
        return False  # without digests, which take hundreds of seconds for a large encoder
    try:
        return digests(locating.model_of(pathlib.Path(config.model.folder))) == digests(out / paths.MODEL)
    except OSError:  # a file is missing
        return False


def _run_of(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / paths.STAGES / name / paths.TRANSFORMER


def _is_within_any(key: str, groups: Iterable[str]) -> bool:
    return any(is_within(key, group) for group in groups)
