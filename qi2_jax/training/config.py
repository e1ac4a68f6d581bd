"""The groups of a config that every training run has, whatever it trains."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from qi2_jax.config.fields import as_typed, changeable, check_at_least
from qi2_jax.sharding import MeshShape
from qi2_jax.training.checkpoints.retention import Policy
from qi2_jax.training.optimizer import Optimizer

MAX_SEED = 1 << 32  # random keys have 32 bits of seed
MAX_AHEAD = 16  # updates; see `runtime.in_flight` for what happens from 32 on

SINKS = ("tensorboard", "wandb")


def check_seed(seed: int) -> None:
    """Raises a ValueError for a seed that random keys cannot take."""
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below {MAX_SEED}")


def check_sinks(sinks: Sequence[str]) -> None:
    """Raises a ValueError for a sink of metrics that is unknown or not installed."""
    if unknown := sorted(set(sinks) - set(SINKS)):
        raise ValueError(f"sinks {unknown} are unknown; choose from {list(SINKS)} (metrics.jsonl is always written)")
    if "wandb" in sinks:
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:  # a folder `wandb` of earlier runs is not a package
            raise ValueError("sinks has 'wandb', which is not installed: pip install 'qi2[wandb]', or leave it out")


@dataclasses.dataclass(frozen=True)
class Train:
    """How long a run trains, and what it reports.

    Attributes:
      steps: updates after which the run is finished.
      ahead: updates that are dispatched before the current one is done.
      log_every: steps between two lines of metrics.
      max_skipped: updates in a row that may be skipped, because their loss or gradient is not finite, before the run
        ends.
      watchdog_seconds: time after which a step that hangs ends the process; 0: never.
      sinks: destinations of metrics besides `metrics.jsonl`.

    Raises:
      ValueError: for a value out of its range, or a sink that is unknown or not installed.
    """

    steps: int
    ahead: int
    log_every: int
    max_skipped: int
    watchdog_seconds: float
    sinks: tuple[str, ...]

    def __post_init__(self) -> None:
        check_at_least(self, steps=1, ahead=0, log_every=1, max_skipped=1, watchdog_seconds=0)
        if self.ahead > MAX_AHEAD:
            raise ValueError(f"ahead is {self.ahead}; it must be at most {MAX_AHEAD}")
        check_sinks(self.sinks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Policy):
    """When checkpoints are saved, and which of them are kept; see `Policy`.

    Attributes:
      every: steps between two checkpoints.

    Raises:
      ValueError: for a value out of its range.
    """

    every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, every=1)
        if self.local_every and self.local_every % self.every == 0:
            raise ValueError(
                f"local_every is {self.local_every}, but a checkpoint is saved every {self.every} steps anyway: "
                "nothing would be saved locally. Make it smaller than checkpoint.every, or 0"
            )


@dataclasses.dataclass(frozen=True)
class ValidationSchedule:
    """When a run is validated.

    Attributes:
      every: steps between two validations; the first and the last step are always validated.

    Raises:
      ValueError: for a value out of its range.
    """

    every: int = changeable()

    def __post_init__(self) -> None:
        check_at_least(self, every=1)


@dataclasses.dataclass(frozen=True)
class SampleSchedule:
    """When sample images are generated.

    Attributes:
      every: steps between two sample grids; grids are also drawn before the first step and after the last. With 0, the
        transformer draws none, and the autoencoder only those two.

    Raises:
      ValueError: for a value out of its range.
    """

    every: int

    def __post_init__(self) -> None:
        check_at_least(self, every=0)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which steps are traced for the profiler.

    Attributes:
      start: first traced step; 0: only when SIGUSR1 asks for a trace.
      steps: steps of a trace.

    Raises:
      ValueError: for a value out of its range.
    """

    start: int
    steps: int

    def __post_init__(self) -> None:
        check_at_least(self, start=0, steps=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Config of a training run. Each task adds what it needs.

    Fields that are changeable move the end of a run, its reports, its machines, or the microbatches in which an update
    is computed; the mathematics does not depend on them.

    Attributes:
      seed: seed of the parameters, and of everything random in training.
      ema_decay: share of the EMA that an update keeps.
      ema_ramp: whether the EMA's decay ramps up, so that the initial parameters are forgotten.
      as_typed: config as plain JSON, which a run records.

    Raises:
      ValueError: for a value out of its range.
    """

    seed: int
    ema_decay: float
    ema_ramp: bool
    mesh: MeshShape = changeable()
    optimizer: Optimizer
    train: Train = changeable()
    validation: ValidationSchedule
    samples: SampleSchedule = changeable()
    checkpoint: Checkpoint = changeable()
    profile: Profile = changeable()
    as_typed: Mapping[str, Any] = as_typed()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if 0 < self.optimizer.decay_steps < self.train.steps:
            raise ValueError(
                f"train.steps is {self.train.steps}, beyond optimizer.decay_steps {self.optimizer.decay_steps}, where "
                "the learning rate reaches zero: take fewer steps; or start a new run with more decay_steps, or with "
                "0, which keeps the rate constant"
            )
