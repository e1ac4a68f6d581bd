"""The count of operations from a jaxpr."""

import jax
import jax.numpy as jnp
import pytest

from qi2_jax.planning.operations import operations


def test_products_in_loops_branches_and_recomputation_count_as_often_as_they_run():
    x, w = jnp.zeros((3, 4)), jnp.zeros((4, 4))
    product = 2 * 3 * 4 * 4
    assert operations(jnp.matmul, x, w) == product
    assert operations(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0], x, w) == 5 * product
    assert operations(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w) == 2 * product

    def loss(x, w):
        return jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ w))(x) @ w)

    assert operations(jax.grad(loss, (0, 1)), x, w) == (2 + 1 + 4) * product
    with pytest.raises(ValueError, match="iterations depends on data"):
        operations(lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x), x, w)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_backward_pass_of_a_convolution_counts_twice_its_forward_pass(stride):
    x, w = jnp.zeros((2, 8, 6, 3)), jnp.zeros((5, 3, 3, 3))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"))

    forward = 2 * 2 * (8 // stride) * (6 // stride) * 5 * 3 * 3 * 3
    assert operations(convolve, x, w) == forward
    assert operations(lambda x, w: jax.vjp(convolve, x, w)[1](convolve(x, w)), x, w) == pytest.approx(4 * forward)
