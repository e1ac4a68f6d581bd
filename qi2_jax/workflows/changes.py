"""What may change in the config of a curriculum that goes on."""

import pathlib
from typing import Any

from qi2_jax.config import recorded
from qi2_jax.inference.encoders import digests
from qi2_jax.runs import locating, paths
from qi2_jax.training import loop
from qi2_jax.training.checkpoints import manager

# Paths and machines: what they lead to is checked by digests where it is read. Where the first stage begins no longer
# matters when it has begun.
ALWAYS_FREE = ("compilation_cache", "records", "start.", "corpus.workers")

FREE_OF_A_STAGE = (
    "compilation_cache",
    "encode.batch_size",
    "encode.mesh.",
    *(f"transformer.{key}" for key in loop.MAY_CHANGE),
)

# Groups of a stage's config on which its samples depend, and of its `transformer` those on which the model does.
MAKES_SAMPLES, MAKES_A_MODEL = ("data", "encode"), ("model", "timesteps.shift", "lora")

# Where a stage ends cannot change when the next one has begun from there.
FROZEN_BY_THE_NEXT = "transformer.train."


def _run_of(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / paths.STAGES / name / paths.TRANSFORMER


def is_begun(out: pathlib.Path, name: str) -> bool:
    return bool(manager.steps(_run_of(out, name) / paths.CHECKPOINTS))


def _begun(config: Any, out: pathlib.Path) -> dict[str, bool]:
    """Which stages have a checkpoint.

    Raises:
      ValueError: if one has, and one before it has none: it began with other weights, or such that are no more.
    """
    begun = {name: is_begun(out, name) for name in config.order}
    count = next((number for number, own in enumerate(begun.values()) if not own), len(begun))
    if later := ", ".join(str(_run_of(out, name)) for name in config.order[count:] if begun[name]):
        old, new, lost = paths.order_of(out), list(config.order), config.order[count]
        if old[: count + 1] != new[: count + 1] and old:
            raise ValueError(
                f"order: {old} -> {new}: {lost}, which has no checkpoint, would stand before stages that have; take "
                f"this back, or let them begin anew (delete {later})"
            )
        raise ValueError(
            f"stage {lost} has no checkpoint, but later ones have, which began with its weights (delete {later}, or "
            f"bring back {_run_of(out, lost)} from a copy)"
        )
    return begun


def _is_moved(config: Any, out: pathlib.Path) -> bool:
    """Whether `model.folder` is another than before, and holds the same models as those that are used."""
    record = recorded.claimed(out / paths.CURRICULUM) if (out / paths.CURRICULUM).is_file() else {}
    if record.get("model", {}).get("folder") == config.model.folder:
        return False  # hundreds of seconds for a large encoder
    try:
        return digests(locating.model_of(pathlib.Path(config.model.folder))) == digests(out / paths.MODEL)
    except OSError:  # of files that are not there
        return False


def allowed_changes(config: Any, out: pathlib.Path) -> tuple[str, ...]:
    """Beginnings of the keys that another call may change: those from which nothing is made yet, and what no result
    depends on."""
    free = [*ALWAYS_FREE, *(f"vae.{key}" for key in loop.MAY_CHANGE)]
    if not (out / paths.CORPUS).exists():
        free += ["corpus."]
    if not (out / paths.MODEL).exists():
        free += ["encoder.", "model."]
    elif config.model.folder:
        free += ["encoder.", "vae."]  # which nothing reads
        if _is_moved(config, out):
            free += ["model."]
    if not manager.steps(out / paths.VAE / paths.CHECKPOINTS) and not (out / paths.MODEL / "vae").exists():
        free += ["vae."]
    begun = _begun(config, out)
    for name, later in zip(begun, [*list(begun.values())[1:], False], strict=True):
        own = [key for key in FREE_OF_A_STAGE if not later or key != FROZEN_BY_THE_NEXT]
        if not begun[name]:
            own += ["transformer."]
        if not (out / paths.STAGES / name).exists():
            own += [""]
        free += [f"stages.{name}.{key}" for key in own]
    count = sum(begun.values())
    if count == 0 or paths.order_of(out)[:count] == list(config.order[:count]):  # more may follow, or others
        free += ["order:"]
    return tuple(free)


def check_accepted(config: Any, out: pathlib.Path, asked: dict[str, Any], free: tuple[str, ...]) -> None:
    """Refuses changes with which what is made could not go on, or would not be of one model, before they are noted."""
    old, new = paths.order_of(out), list(config.order)
    same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))

    def trained(names: list[str]) -> list[pathlib.Path]:
        return [place for name in dict.fromkeys(names) if (place := _run_of(out, name)).exists()]

    # {beginning of keys: what was made with them, and from that}
    redo = {
        "corpus.": [out / paths.CORPUS, out / paths.STAGES],
        "encoder.": [out / paths.MODEL, out / paths.STAGES],
        "model.": [out / paths.MODEL, out / paths.STAGES],
        "vae.model.": [out / paths.VAE, out / paths.MODEL, out / paths.STAGES],
        "vae.channels:": [out / paths.VAE, out / paths.MODEL, out / paths.STAGES],
        "order:": trained([*old[same:], *new[same:]]),
    }
    for number, name in enumerate(new, start=1):
        later = trained(new[number:])
        redo |= {f"stages.{name}.{key}.": [out / paths.STAGES / name, *later] for key in MAKES_SAMPLES}
        redo |= {f"stages.{name}.transformer.{key}.": [_run_of(out, name), *later] for key in MAKES_A_MODEL}
        if later:
            redo[f"stages.{name}.transformer.train.steps:"] = later
    free += tuple(f"stages.{name}.data.mixture." for name in new)
    refused = [
        f"{line} (delete {', '.join(map(str, made))})"
        for line in recorded.changes(out / paths.CURRICULUM, asked)
        for begins, made in redo.items()
        if line.startswith(begins) and not line.startswith(free)
    ]
    if refused:
        raise ValueError(
            f"what is made in {out} cannot go on with these changes; take them back, or delete what was made with "
            "others:\n  " + "\n  ".join(refused)
        )
