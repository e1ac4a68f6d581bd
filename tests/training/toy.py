"""A toy task, its config and its runs, for tests of the training loop."""

import dataclasses
import itertools
from collections.abc import Callable, Collection
from typing import Any

import ml_collections
import numpy as np

from qi2_jax import sharding
from qi2_jax.config import loading
from qi2_jax.config.parsing import parse
from qi2_jax.training import loop
from qi2_jax.training.config import TrainingConfig
from qi2_jax.training.microbatch import Microbatch, Stats, as_update, put_scalar
from qi2_jax.training.task import Task
from qi2_jax.training.telemetry import accounting, metrics
from tests.training.test_step import OPTIMIZER, Toy, loss


def config(**train):
    return ml_collections.ConfigDict(
        {
            "seed": 3,
            "ema_decay": 0.9,
            "ema_ramp": False,
            "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
            "optimizer": dataclasses.asdict(OPTIMIZER),
            "train": {
                **{"steps": 12, "ahead": 2, "log_every": 1, "max_skipped": 10, "watchdog_seconds": 0.0, "sinks": ()},
                **train,
            },
            "validation": {"every": 6},
            "samples": {"every": 6},
            "checkpoint": {"every": 100, "keep": 9, "keep_every": 0, "keep_best": 0, "checksums": False},
            "profile": {"start": 0, "steps": 1},
        }
    )


def mesh():
    return sharding.make_mesh(sharding.MeshShape(8, 1, 1))


@dataclasses.dataclass(kw_only=True)
class ToyTask(Task):
    """A toy model on the same batch in every step; batches in `spoilt` are not finite."""

    spoilt: Collection[int] = ()
    evaluate: Callable[..., Any] | None = None
    draw: Callable[..., Any] | None = None
    accumulate: bool = False
    peak_flops: float | None = None
    name: str = "toy"
    make_model = staticmethod(Toy)
    loss = staticmethod(loss)

    def __post_init__(self):
        self.data = {}
        self.frozen = put_scalar(mesh(), np.float32(0.5))
        self.evaluates, self.draws = self.evaluate is not None, self.draw is not None

    def microbatch(self, step):
        rows = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
        return Microbatch(0, rows * np.float32("nan") if step in self.spoilt else rows, stats=Stats(8))

    def updates(self, step):
        return (as_update([self.microbatch(later)]) for later in itertools.count(step + 1))

    def examples(self):
        return [self.microbatch(0)]


def parsed(config):
    return parse(TrainingConfig, loading.to_dict(config))


def task(spoilt=(), **fields):
    return ToyTask(spoilt=spoilt, **fields)


def train(task, config, out, **options):
    return loop.train(task, parsed(config), out, mesh(), **options)


def kinds(out):
    return [event["event"] for event in accounting.read_events(out / accounting.EVENTS)]


def evaluated(out):
    return [(line["step"], line["validation_loss"]) for line in metrics.lines(out / metrics.FILE) if len(line) == 2]
