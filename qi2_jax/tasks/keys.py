"""The keys of a stage's config, by group: a misspelt one is an error, not a default that stays."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.diffusion.timesteps import LAWS, Shift
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.models.vae import VAEConfig
from qi2_jax.sharding import MeshShape
from qi2_jax.training.checkpoints.retention import Policy

# {key: None for a value, the keys of a group, or the dataclass that is made of it}
Keys = Mapping[str, Any]


def _values(names: str) -> dict[str, None]:
    return dict.fromkeys(names.split())


_LOOP = {
    **_values("seed ema_decay ema_ramp"),
    "mesh": MeshShape,
    "optimizer": _values("lr betas eps weight_decay clip warmup decay_steps"),
    "train": _values("steps ahead log_every max_skipped watchdog_seconds sinks"),
    "checkpoint": _values("every") | dict.fromkeys(field.name for field in dataclasses.fields(Policy)),
    "profile": _values("start steps"),
}
VAE: Keys = {
    **_LOOP,
    **_values("crop loss batch_size statistics_batches channels"),
    "model": VAEConfig,
    "validation": _values("every"),
    "samples": _values("every"),
}
TRANSFORMER: Keys = {
    **_LOOP,
    **_values("batch_sizes images_per_device batches_per_update dropout"),
    "model": MMDiTConfig,
    "execution": _values("dtype kernel remat"),
    "timesteps": {"law": None, "shift": Shift, **LAWS},
    "start": _values("folder"),
    "lora": _values("rank alpha targets"),
    "validation": _values("every samples"),
    "samples": _values("every count steps guidance seed prompts edits"),
}
ENCODE: Keys = {**_values("online dtype batch_size records_per_unit"), "mesh": MeshShape}
CURRICULUM: Keys = {
    **_values("platform compilation_cache order stages"),
    "vae": VAE,
    "corpus": _values("edits texts side workers"),
    "model": _values("folder"),
    "encoder": _values("folder width layers heads seed"),
    "start": _values("folder"),
}
DATA: Keys = {
    **_values("sides ratios max_upscale max_cropped smaller_too held_out channels workers"),
    "mixture": _values("sides tasks conditions"),
    "thresholds": Thresholds,
}


def check(name: str, group: Any, keys: Keys, optional: tuple[str, ...] = ()) -> None:
    """Compares a group of a config with the keys that are read of it.

    Args:
      name: of the group, in front of the keys in messages; empty for the whole config.
      optional: keys that may be missing, beside those of dataclasses that have a default.

    Raises:
      ValueError: for a key that nothing reads, with the one that may have been meant, or a missing one.
    """
    if unknown := sorted(set(group) - set(keys)):
        close = difflib.get_close_matches(unknown[0], keys, 1)
        meant = f"did you mean {close[0]!r}?" if close else f"there are {sorted(keys)}"
        raise ValueError(f"config has the key '{_path(name, unknown[0])}', which nothing reads; {meant}")
    for key, within in keys.items():
        path = _path(name, key)
        if key not in group:
            if key not in optional:
                raise ValueError(f"config lacks the key '{path}'")
        elif isinstance(within, Mapping):
            check(path, group[key], within)
        elif within is not None:
            fields = dataclasses.fields(within)
            has_default = tuple(field.name for field in fields if field.default is not dataclasses.MISSING)
            check(path, group[key], {field.name: None for field in fields}, has_default)


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
