"""The group `optimizer` of a config."""

import dataclasses

MAX_SETTING = 1e12  # a larger number is a mistake, and fp32 ends at 3e38


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam with decoupled weight decay, a linear warm-up, and clipping by the global norm.

    Attributes:
      lr: learning rate after the warm-up.
      betas: decay rates of the first and the second moment.
      eps: term added to the root of the second moment.
      weight_decay: decay of matrices in each step, in units of the learning rate.
      clip: largest global norm of a gradient.
      warmup: updates over which the rate rises to `lr`.
      decay_steps: updates, including the warm-up, after which a cosine has brought the rate to zero; 0: constant.

    Raises:
      ValueError: for a value out of its range.
    """

    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    clip: float
    warmup: int
    decay_steps: int

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "clip", "warmup", "decay_steps"):
            value, positive = getattr(self, name), name in ("lr", "eps", "clip")
            if not (value > 0 or (value == 0 and not positive)) or value > MAX_SETTING:
                bound = "above 0" if positive else "at least 0"
                raise ValueError(f"{name} is {value}; it must be {bound} and at most {MAX_SETTING:g}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; it must be two numbers in [0, 1)")
        if 0 < self.decay_steps <= self.warmup:
            raise ValueError(f"warmup is {self.warmup}; it must end before decay_steps {self.decay_steps}")
