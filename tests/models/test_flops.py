"""FLOPs by formula against those that XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import LogitNormal, Shift
from qi2_jax.models import lora
from qi2_jax.models.flops import flops_per_step
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import Execution, MMDiT, MMDiTConfig
from qi2_jax.planning.compile import abstract_batch
from qi2_jax.sequence import BIDIRECTIONAL, Layout
from qi2_jax.tasks.transformer.objective import Objective, make_loss

# One layer, image, head and chunk of queries, because XLA counts the body of a loop once. Products dominate its cost.
CONFIG = MMDiTConfig(1, 1, 256, 3, 16, 128, (16, 120, 120), attention=BIDIRECTIONAL)
LAYOUT = Layout((64,), 192)


def counted(kernel: str, remat: bool, adapter: LoRAConfig | None = None, config: MMDiTConfig = CONFIG) -> float:
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    model = jax.eval_shape(lambda: MMDiT(config, key=jax.random.key(0)))
    execution, frozen = Execution(jnp.float32, kernel, remat), None
    objective = Objective(Shift(), execution)
    if adapter is not None:
        frozen, model = model, lora.abstract(model, adapter)
        objective = Objective(Shift(), execution, lora.join)
    loss = make_loss(LogitNormal(), objective)
    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    batch = abstract_batch(config, LAYOUT, 1, mesh)
    keys = jax.random.split(jax.random.key(0), 1)
    return gradient.lower(model, frozen, LAYOUT, batch, keys).compile().cost_analysis()["flops"]


def test_formula():
    """The chunked kernel recomputes the scores in the backward pass, as the TPU kernel does."""
    flops = flops_per_step(CONFIG, LAYOUT, 1)
    reference, chunked, remat = counted("reference", False), counted("chunked", False), counted("chunked", True)
    assert flops.model == pytest.approx(reference, rel=0.02)
    assert flops.executed(remat=False) - flops.model == pytest.approx(chunked - reference, rel=0.02)
    assert flops.executed(remat=True) - flops.executed(remat=False) == pytest.approx(remat - chunked, rel=0.02)


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("targets", [("blocks.*",), ("*",)])
def test_an_adapter_has_no_gradients_of_the_frozen_weights(rank, targets):
    """XLA counts three layers in a loop once. With a single layer, it would skip the gradient of the layer's input."""
    adapter = LoRAConfig(rank, 8.0, targets)
    flops = flops_per_step(CONFIG, LAYOUT, 1, adapter)
    looped = dataclasses.replace(CONFIG, layers=3)
    assert flops.model == pytest.approx(counted("reference", False, adapter, looped), rel=0.03)


def test_block_causal_counts_visible_pairs():
    """With text 2, condition 3, text 1 and target 4, the queries see 1, 2, 5, 5, 5, 6 and four times 10 keys."""
    config = dataclasses.replace(CONFIG, attention="block_causal")
    flops = flops_per_step(config, Layout((2, 1), 4, (3,)), 2)
    assert flops.attention == 2 * 4 * 256 * (1 + 2 + 3 * 5 + 6 + 4 * 10)
