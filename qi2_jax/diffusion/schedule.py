"""The times at which the sampler evaluates the model, as defined by the published scheduler's configuration."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from qi2_jax.diffusion.timesteps import Shift

CLASS = "FlowMatchEulerDiscreteScheduler"

# Options of the published scheduler that would change the arithmetic, each with the only value that is supported.
UNSUPPORTED = {
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "num_train_timesteps": 1000,
}
ROUNDING = 1e-6  # fp32 error of the shift at time 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Euler steps from t = 1 to t = 0.

    Attributes:
      shift: resolution-dependent shift, the same as in training.
      terminal: last time before 0. The times of several steps are stretched to end there; None or 0: no stretching.
      sample_sigmas: fixed times before the shift, for few-step models; they determine the number of steps.

    Raises:
      ValueError: for a terminal time outside [0, 1).
    """

    shift: Shift = Shift()
    terminal: float | None = 0.02
    sample_sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.terminal is not None and not (isinstance(self.terminal, (int, float)) and 0 <= self.terminal < 1):
            raise ValueError(f"the terminal time is {self.terminal!r}; it must be in [0, 1), or null")

    def times(self, steps: int, tokens: int, sigmas: Sequence[float] | None = None) -> Float[np.ndarray, "steps_1"]:
        """Decreasing fp32 times that end in 0: one more than there are model evaluations.

        A single time is not stretched to the terminal: there is no second time to stretch against, and with one step
        all noise must go in that step (diffusers divides by zero here). One step therefore goes from 1 to 0.

        Args:
          steps: number of evenly spaced times before the shift; ignored if sigmas are given or configured.
          tokens: tokens of the target image.
          sigmas: times before the shift to use instead, each in (0, 1].

        Raises:
          ValueError: for fewer than one step, times outside (0, 1] or not decreasing, or if the shift or the terminal
            moves times outside of [0, 1].
        """
        fixed = self.sample_sigmas if sigmas is None else sigmas
        if fixed is None and steps < 1:
            raise ValueError(f"the number of steps must be at least 1, got {steps}")
        t = np.asarray(np.linspace(1.0, 1 / steps, steps) if fixed is None else fixed, np.float32)
        if t.ndim != 1 or not len(t) or not np.all((t > 0) & (t <= 1)):
            raise ValueError(f"sigmas must be a list of times in (0, 1], got {t.tolist()}")
        if not np.all(np.diff(t) < 0):
            raise ValueError(f"sigmas must decrease from one to the next, got {t.tolist()}; sort them, largest first")
        try:
            t = self.shift(t, tokens)
        except OverflowError:
            t = np.full_like(t, np.nan)  # refused below
        if self.terminal and len(t) > 1:
            t = self._stretched(t)
        times = np.append(t, 0.0).astype(np.float32)
        times = np.where(np.abs(times - 1) < ROUNDING, np.float32(1), times)
        if not np.all((times >= 0) & (times <= 1)):
            raise ValueError(f"{self.shift} moves the times of an image of {tokens} tokens outside of [0, 1]: {times}")
        return times

    def _stretched(self, t: Float[np.ndarray, "steps"]) -> Float[np.ndarray, "steps"]:
        """Times whose distance from 1 is scaled so that the last one equals the terminal."""
        assert self.terminal is not None
        if abs(1 - t[-1]) < ROUNDING:
            raise ValueError(
                f"the last of the times {t.tolist()} is 1, so they cannot be stretched to end at {self.terminal}; "
                "give decreasing sigmas, or a smaller shift"
            )
        return 1 - (1 - t) / ((1 - t[-1]) / (1 - self.terminal))

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], sample_sigmas: Sequence[float] | None = None) -> "Schedule":
        """Parses `scheduler_config.json`, and `sample_sigmas` from the pipeline's `model_index.json`.

        Raises:
          ValueError: for another scheduler class, unsupported options (each is listed with its value), or values that
            are not numbers.
        """
        if values.get("_class_name", CLASS) != CLASS:
            raise ValueError(f"scheduler {values['_class_name']!r} is not supported, only {CLASS}")
        bad = {key: values[key] for key, only in UNSUPPORTED.items() if values.get(key, only) != only}
        if bad:
            raise ValueError(f"scheduler options {bad} are not supported; set them to {UNSUPPORTED}")
        shift = Shift(
            dynamic=values.get("use_dynamic_shifting", False),
            base_tokens=values.get("base_image_seq_len", 256),
            max_tokens=values.get("max_image_seq_len", 4096),
            base_shift=values.get("base_shift", 0.5),
            max_shift=values.get("max_shift", 1.15),
            kind=values.get("time_shift_type", "exponential"),
            shift=values.get("shift", 1.0),
        )
        if sample_sigmas is not None:
            if not isinstance(sample_sigmas, (list, tuple)) or not all(type(t) in (int, float) for t in sample_sigmas):
                raise ValueError(f"sample_sigmas is {sample_sigmas!r}; it must be a list of numbers")
            sample_sigmas = tuple(sample_sigmas)
        return cls(shift, values.get("shift_terminal"), sample_sigmas)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of `scheduler_config.json`, which has no place for `sample_sigmas`."""
        return {
            "_class_name": CLASS,
            "num_train_timesteps": UNSUPPORTED["num_train_timesteps"],
            "shift": self.shift.shift,
            "use_dynamic_shifting": self.shift.dynamic,
            "base_shift": self.shift.base_shift,
            "max_shift": self.shift.max_shift,
            "base_image_seq_len": self.shift.base_tokens,
            "max_image_seq_len": self.shift.max_tokens,
            "time_shift_type": self.shift.kind,
            "shift_terminal": self.terminal,
        }
