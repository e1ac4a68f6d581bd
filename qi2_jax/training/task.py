"""The protocol between the training loop and a task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from qi2_jax.training.mean import Mean
from qi2_jax.training.microbatch import Microbatch
from qi2_jax.training.step import IsTrained, TrainState
from qi2_jax.training.telemetry.metrics import Drawing

# A callback for long evaluations. It raises `run.Interrupted` if a signal asks the run to stop.
CheckSignals = Callable[[], None]


@runtime_checkable
class Task(Protocol):
    """A model, its data and its loss. Each task is one class in `qi2_jax/tasks/`, constructed by keyword.

    Attributes:
      name: label of the progress bar.
      data: identity of the training data, as plain JSON. A run resumes only on the data that it was started with.
      frozen: arrays that the loss reads and training does not change.
      accumulate: whether an update may have several microbatches.
      ema_ramp: whether the EMA decay ramps up, see `step.make_programs`.
      replicas: number of replicas along the mesh axis `data`. Each sums the gradients of its own images, and the sums
        are added once per update; 1: the compiler adds all gradients as they arise. The loss must be the mean of the
        losses of the replicas, and must not shard anything over `data`.
      sum_dtype: dtype in which gradients are added up across replicas.
      peak_flops: peak FLOP/s of one device, for the utilisation metric; None if unknown.
      evaluates: whether `evaluate` has anything to compute.
      draws: whether `draw` has anything to draw.
    """

    name: str
    data: Mapping[str, Any]
    frozen: Any = None
    accumulate: bool = False
    ema_ramp: bool = False
    replicas: int = 1
    sum_dtype: Any = jnp.float32
    peak_flops: float | None = None
    evaluates: bool = False
    draws: bool = False

    def make_model(self, key: jax.Array) -> Any:
        """Builds the module that is trained, with random parameters."""
        ...

    def loss(
        self, model: Any, frozen: Any, layout: Any, batch: Any, keys_B: Key[Array, "B"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""] | Mean]]:
        """The mean loss over the images of a microbatch, and further metrics; see `step.Loss`."""
        ...

    def prepare(self, frozen: Any, layout: Any, batch: Any) -> Any:
        """Completes a batch on the devices before the loss reads it; no gradient flows through this."""
        return batch

    def trained(self, layout: Any) -> IsTrained | None:
        """The parameters that an update trains, by the layout of its batch; None for all, as always with `accumulate`.

        The others keep their values bit for bit, whatever momentum and weight decay would do. Their gradients count as
        zero, also in the norm that is clipped, and the EMA still moves towards them.
        """
        return None

    def updates(self, step: int) -> Iterator[Sequence[Microbatch]]:
        """The microbatches of each update after `step`, as host arrays, without end."""
        ...

    def examples(self) -> Sequence[Microbatch]:
        """One example microbatch per layout, for compilation."""
        ...

    def initial_state(self, state: TrainState) -> TrainState:
        """The state that a new run starts from, given a random one."""
        return state

    def on_config_accepted(self) -> None:
        """Updates `model/` to match the accepted config. Only process 0 calls it."""
        return

    def evaluate(self, state: TrainState, check_signals: CheckSignals) -> dict[str, Any]:
        """Validation metrics of a state: before the first step, every `validation.every` steps, and after the last."""
        return {}

    def draw(self, state: TrainState, check_signals: CheckSignals) -> dict[str, Drawing]:
        """Sample grids of a state by name: before the first step, every `samples.every` steps, and after the last."""
        return {}
