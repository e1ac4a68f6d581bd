"""All kernels against the reference, in values and gradients; sharded kernels; memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax import attention, sharding
from qi2_jax.attention.splash import Splash, block_sizes, computed_pairs
from qi2_jax.sequence import BIDIRECTIONAL, Layout

KERNELS = {"chunked": attention.KERNELS["chunked"], "splash": Splash(largest_block=128, interpret=True)}

LAYOUT = Layout(text=(20, 30), conditions=(60,), target=190)  # 300 slots: two chunks, three blocks


@dataclasses.dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    heads: tuple[int, int]
    visible_until: np.ndarray | None
    padding: tuple[tuple[int, int], ...] | None  # ranges of invalid keys; None: no mask
    batch: int = 2


CASES = {
    "block_causal": Case(300, 300, (4, 2), LAYOUT.visible_until(), ((15, 20), (70, 80), (105, 110), (290, 300))),
    "causal": Case(133, 133, (2, 2), np.arange(133) + 1, ((130, 133),)),
    "bidirectional": Case(300, 300, (1, 1), LAYOUT.visible_until(BIDIRECTIONAL), ((5, 20),), batch=1),
    "all_visible": Case(70, 70, (3, 1), None, None),
    "suffix_of_cached_keys": Case(90, 300, (2, 1), None, ((3, 20), (280, 300))),
    "causal_suffix": Case(90, 140, (2, 2), np.arange(90) + 51, ((40, 50),)),
}


def operands(case: Case, seed: int = 0):
    """Queries, keys, values, validity, and a cotangent that is zero at padding queries."""
    rng = np.random.default_rng(seed)
    draw = lambda slots, heads: rng.normal(size=(case.batch, slots, heads, 16)).astype(np.float32)
    q, k, v = draw(case.queries, case.heads[0]), draw(case.keys, case.heads[1]), draw(case.keys, case.heads[1])
    valid = np.ones((case.batch, case.keys), bool)
    for row, (start, end) in enumerate(case.padding or ()):
        valid[:, start:end] = False
        valid[row % case.batch, start - 2 : end] = False  # rows of a batch have different lengths
    real = valid[:, case.keys - case.queries :, None, None]
    return q, k, v, None if case.padding is None else valid, np.where(real, draw(case.queries, case.heads[0]), 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(kernel, name, q, k, v, valid, cotangent):
    call = lambda q, k, v: attention.attention(
        q, k, v, visible_until=CASES[name].visible_until, key_valid_BT=valid, kernel=kernel
    )
    y, pullback = jax.vjp(call, q, k, v)
    return y, *pullback(cotangent)


@functools.cache
def expected(name):
    return jax.device_get(values_and_gradients("reference", name, *operands(CASES[name])))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_reference(kernel, name):
    *inputs, cotangent = operands(CASES[name])
    y, *gradients = values_and_gradients(KERNELS[kernel], name, *inputs, cotangent)
    expected_y, *expected_gradients = expected(name)
    assert np.all(np.isfinite(y))
    real = cotangent != 0
    np.testing.assert_allclose(np.where(real, y, 0), np.where(real, expected_y, 0), atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-5)


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_sample_without_valid_keys_stays_finite(kernel):
    q, k, v, valid, cotangent = operands(CASES["causal_suffix"])
    results = values_and_gradients(
        KERNELS.get(kernel, kernel), "causal_suffix", q, k, v, np.zeros_like(valid), np.zeros_like(cotangent)
    )
    for result in results:
        assert np.all(np.isfinite(result))
    for gradient in results[1:]:
        assert not np.any(gradient)


@pytest.mark.parametrize("shape", [sharding.MeshShape(2, 2, 2), sharding.MeshShape(1, 2, 4)])
def test_kernel_on_a_mesh(shape):
    """Heads are split over `tensor` where the key-value heads allow it; the second mesh has more devices than those."""
    case = dataclasses.replace(CASES["block_causal"], batch=4)
    *inputs, cotangent = operands(case)
    local = values_and_gradients("chunked", "block_causal", *inputs, cotangent)
    split = values_and_gradients(sharding.Attention(sharding.make_mesh(shape)), "block_causal", *inputs, cotangent)
    for a, b in zip(local, split, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunked_keeps_no_matrix_of_scores():
    length, heads = 2048, 4
    x = jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32)
    call = lambda q, k, v: jnp.sum(attention.attention(q, k, v, kernel="chunked") ** 2)
    compiled = jax.jit(jax.grad(call, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < heads * length**2 * 4 / 2


def test_unknown_kernel_is_refused():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError, match="'flash' is unknown; choose one of"):
        attention.attention(x, x, x, kernel="flash")


def test_blocks_follow_the_mask_and_the_chip():
    """Keys in whole blocks up to an image's end waste less than blocks of the longest size."""
    until = Layout(text=(32, 192), conditions=(4144,), target=4144).visible_until()
    sizes = {overhead: block_sizes(until, 1024, overhead) for overhead in (1, 1 << 16, 1 << 18, 1 << 30)}
    computed = [computed_pairs(until, queries, keys) for queries, keys, _ in sizes.values()]
    assert computed == sorted(computed), "more overhead, larger blocks, more pairs"
    assert sizes[1][0] == 128 and sizes[1 << 30][0] == 1024
    for queries, keys, step in sizes.values():
        assert queries % 128 == keys % step == step % 128 == 0 and queries * step <= 1024**2
