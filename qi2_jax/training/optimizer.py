"""The group `optimizer` of a config."""

import dataclasses

from qi2_jax.config.fields import check_one_of

KINDS = ("adam", "muon")
MAX_SETTING = 1e12  # a larger number is a mistake, and fp32 ends at 3e38


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam or Muon with decoupled weight decay, a linear warm-up, and clipping by the global norm.

    Attributes:
      lr: learning rate after the warm-up.
      betas: Adam's decay rates of the first and the second moment.
      eps: term added to the root of the second moment.
      weight_decay: decay of matrices in each step, in units of the learning rate.
      clip: largest global norm of a gradient.
      warmup: updates over which the rate rises to `lr`.
      decay_steps: updates, including the warm-up, after which a cosine has brought the rate to zero; 0: constant.
      kind: "adam", or "muon": matrices are trained with Muon, and biases, norms and other vectors with Adam.
      momentum: decay rate of Muon's first moment.
      adam_lr: learning rate of the vectors with "muon", with the warm-up and the decay of `lr`.

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
    kind: str = "adam"
    momentum: float = 0.95
    adam_lr: float = 0.0

    def __post_init__(self) -> None:
        check_one_of(self, "kind", KINDS)
        for name in ("lr", "eps", "weight_decay", "clip", "warmup", "decay_steps", "adam_lr"):
            value, positive = getattr(self, name), name in ("lr", "eps", "clip")
            if not (value > 0 or (value == 0 and not positive)) or value > MAX_SETTING:
                bound = "above 0" if positive else "at least 0"
                raise ValueError(f"{name} is {value}; it must be {bound} and at most {MAX_SETTING:g}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; it must be two numbers in [0, 1)")
        if 0 < self.decay_steps <= self.warmup:
            raise ValueError(f"warmup is {self.warmup}; it must end before decay_steps {self.decay_steps}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1")
        if (self.kind == "muon") != (self.adam_lr > 0):
            raise ValueError(
                f"adam_lr is {self.adam_lr} with kind {self.kind!r}; it must be above 0 with 'muon', where it is the "
                "learning rate of biases and norms, and 0 with 'adam', where lr is"
            )
