"""Timestep distributions of training, and the resolution-dependent shift of time.

Dims: `B` batch, `Q` quantiles.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from qi2_jax.models.layers import AnyArray


@runtime_checkable
class TimestepDistribution(Protocol):
    """A distribution of times in (0, 1) before any shift: samples, one per key, and quantiles."""

    def sample(self, keys_B: Key[Array, "B"]) -> Float[Array, "B"]: ...

    def quantile(self, q: Float[AnyArray, "Q"]) -> Float[AnyArray, "Q"]: ...


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """`t = sigmoid(mean + std z)` with standard normal z (Esser et al., 2024, section 3.1).

    Raises:
      ValueError: for a mean that is not finite, or a standard deviation that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
            raise ValueError(f"logit_normal has mean {self.mean} and std {self.std}; std must be above 0, both finite")

    def sample(self, keys_B: Key[Array, "B"]) -> Float[Array, "B"]:
        return jax.nn.sigmoid(self.mean + self.std * jax.vmap(jax.random.normal)(keys_B))

    def quantile(self, q: Float[AnyArray, "Q"]) -> Float[AnyArray, "Q"]:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(q))


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform distribution over [low, high).

    Raises:
      ValueError: unless 0 <= low < high <= 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"uniform has low {self.low} and high {self.high}; it needs 0 <= low < high <= 1")

    def sample(self, keys_B: Key[Array, "B"]) -> Float[Array, "B"]:
        return jax.vmap(lambda key: jax.random.uniform(key, minval=self.low, maxval=self.high))(keys_B)

    def quantile(self, q: Float[AnyArray, "Q"]) -> Float[AnyArray, "Q"]:
        return self.low + (self.high - self.low) * q


TIMESTEP_DISTRIBUTIONS: dict[str, Callable[..., TimestepDistribution]] = {
    "logit_normal": LogitNormal,
    "uniform": Uniform,
}


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves times towards noise, further for images with more tokens: `t' = s t / (1 + (s - 1) t)`.

    Training, validation and sampling share this function. Only tokens of the target image count, not those of text and
    condition images (diffusers `FlowMatchEulerDiscreteScheduler`, `pipeline_qwenimage21.py`).

    Attributes:
      dynamic: `s = exp(mu)` ("exponential") or `s = mu` ("linear") with mu linear in tokens through
        (base_tokens, base_shift) and (max_tokens, max_shift). If False, `s = shift` at every resolution.

    Raises:
      ValueError: for an unknown kind, values that are not finite numbers, or base_tokens >= max_tokens.
    """

    dynamic: bool = True
    base_tokens: int = 256
    max_tokens: int = 8192
    base_shift: float = 0.5
    max_shift: float = 0.9
    kind: str = "exponential"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("exponential", "linear"):
            raise ValueError(f"time shift {self.kind!r} is unknown; choose 'exponential' or 'linear'")
        for name in ("base_tokens", "max_tokens", "base_shift", "max_shift", "shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"time shift: {name} is {value!r}; it must be a finite number")
        if not isinstance(self.dynamic, bool):
            raise ValueError(f"time shift: dynamic is {self.dynamic!r}; it must be true or false")
        if self.dynamic and self.base_tokens >= self.max_tokens:
            raise ValueError(f"time shift: base_tokens {self.base_tokens} must be below max_tokens {self.max_tokens}")
        if not self.dynamic and self.shift <= 0:
            raise ValueError(f"time shift: shift is {self.shift}; it must be above 0")

    def strength(self, tokens: Any) -> Any:
        """The strength s for an image of `tokens` tokens (a number or an array)."""
        if not self.dynamic:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = slope * tokens + (self.base_shift - slope * self.base_tokens)
        if self.kind == "linear":
            return mu
        return math.exp(mu) if isinstance(mu, float) else jnp.exp(mu)

    def __call__(self, t: Any, tokens: Any) -> Any:
        """Shifted times in (0, 1] for t in (0, 1]; NumPy or JAX arrays, or numbers."""
        strength = self.strength(tokens)
        return strength * t / (1 + (strength - 1) * t)
