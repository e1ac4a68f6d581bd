"""What the backward pass keeps does not change gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.models import tree
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.models.recomputation import POLICIES
from qi2_jax.sequence import Layout, place

CONFIG = MMDiTConfig(2, 2, 16, 3, 4, 8, (4, 6, 6))
LAYOUT = Layout((3, 2), 4, (4,))


@pytest.fixture(scope="module")
def gradient():
    rng = np.random.default_rng(0)
    model = MMDiT(CONFIG, key=jax.random.key(0))
    # Random weights everywhere: the modulation and the output would start at zero.
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.1), leaf.dtype), model)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    positions, valid = place(LAYOUT, (2, 2), (2, 2), [(2, 1)])
    given = Conditioning(draw(2, 5, 8), jnp.stack([positions] * 2), jnp.stack([valid] * 2), draw(2, 4, 4))
    target, t = draw(2, 4, 4), jnp.array([0.2, 0.7])

    def of(execution: Execution) -> dict[str, np.ndarray]:
        loss = lambda model: jnp.mean(model(LAYOUT, target, t, given, execution) ** 2)
        return {name: np.asarray(leaf) for name, leaf in tree.to_dict(jax.jit(jax.grad(loss))(model)).items()}

    return of


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_all_policies_have_the_same_gradients(gradient, kernel):
    expected = gradient(Execution(kernel=kernel))
    assert all(np.abs(leaf).max() > 0 for leaf in expected.values())
    for policy in POLICIES:
        found = gradient(Execution(kernel=kernel, remat=True, keep=policy))
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-8, err_msg=f"{policy} {name}")
