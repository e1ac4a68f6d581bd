"""FLOPs by formula against those that XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import LogitNormal, Shift
from qi2_jax.models import lora
from qi2_jax.models.flops import Flops, flops_of_tokens, flops_per_step
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import Execution, MMDiT, MMDiTConfig
from qi2_jax.models.recomputation import POLICIES
from qi2_jax.planning.compile import abstract_batch
from qi2_jax.sequence import BIDIRECTIONAL, BLOCK_CAUSAL, Layout, place
from qi2_jax.tasks.transformer.objective import Objective, make_loss

# One layer, image, head and chunk of queries, because XLA counts the body of a loop once. Products dominate its cost.
CONFIG = MMDiTConfig(1, 1, 256, 3, 16, 128, (16, 120, 120), attention=BIDIRECTIONAL)
LAYOUT = Layout((64,), 192)


def counted(kernel: str, keep: str | None, adapter: LoRAConfig | None = None, config: MMDiTConfig = CONFIG) -> float:
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    model = jax.eval_shape(lambda: MMDiT(config, key=jax.random.key(0)))
    execution, frozen = Execution(jnp.float32, kernel, keep is not None, keep or "inputs"), None
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
    reference, chunked = counted("reference", None), counted("chunked", None)
    assert flops.model == pytest.approx(reference, rel=0.02)
    assert flops.executed(CONFIG) - flops.model == pytest.approx(chunked - reference, rel=0.02)
    # The tolerance leaves room for norms and activation functions. One layer of D x D would be 1.6% of the step.
    for policy in POLICIES:
        again = flops.executed(CONFIG, policy) - flops.executed(CONFIG)
        assert again == pytest.approx(counted("chunked", policy) - chunked, rel=0.02, abs=1e-2 * chunked), policy


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("targets", [("blocks.*",), ("*",)])
def test_an_adapter_has_no_gradients_of_the_frozen_weights(rank, targets):
    """XLA counts three layers in a loop once. With a single layer, it would skip the gradient of the layer's input."""
    adapter = LoRAConfig(rank, 8.0, targets)
    flops = flops_per_step(CONFIG, LAYOUT, 1, adapter)
    looped = dataclasses.replace(CONFIG, layers=3)
    assert flops.model == pytest.approx(counted("reference", None, adapter, looped), rel=0.03)


def test_block_causal_counts_visible_pairs():
    """With text 2, condition 3, text 1 and target 4, the queries see 1, 2, 5, 5, 5, 6 and four times 10 keys."""
    config = dataclasses.replace(CONFIG, attention="block_causal")
    flops = flops_per_step(config, Layout((2, 1), 4, (3,)), 2)
    assert flops.attention == 2 * 4 * 256 * (1 + 2 + 3 * 5 + 6 + 4 * 10)


GRIDS = st.sampled_from([(1, 2), (2, 3)])


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), GRIDS, GRIDS), min_size=1, max_size=3),
    st.sampled_from([BLOCK_CAUSAL, BIDIRECTIONAL]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_tokens_cost_what_their_samples_cost_without_padding(samples, attention, adapted):
    config = MMDiTConfig(2, 2, 32, 3, 8, 16, (8, 12, 12), attention=attention)
    adapter = LoRAConfig(4, 4.0, ("*",)) if adapted else None
    layout = Layout((5, 4), 7, (6,))
    valid_BS = np.stack([place(layout, texts, target, [source])[1] for *texts, target, source in samples])
    alone = [
        flops_per_step(config, Layout(tuple(texts), target[0] * target[1], (source[0] * source[1],)), 1, adapter)
        for *texts, target, source in samples
    ]
    found = flops_of_tokens(config, layout, valid_BS, adapter)
    assert dataclasses.astuple(found) == pytest.approx(np.sum([dataclasses.astuple(one) for one in alone], axis=0))
    assert found.model == pytest.approx(sum(one.model for one in alone))


def test_a_full_layout_has_no_padding():
    layout = Layout((0, 4), 7, (6,))
    full = flops_of_tokens(CONFIG, layout, np.ones((3, layout.length), bool))
    assert full == Flops(*dataclasses.astuple(flops_per_step(CONFIG, layout, 3)))
