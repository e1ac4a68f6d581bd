"""Counting FLOPs, HBM traffic and collectives of compiled programs."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qi2_jax.planning import hlo
from qi2_jax.planning.analysis import analyse
from qi2_jax.planning.compile import topology_mesh
from qi2_jax.planning.programs import bandwidth, bound_of
from qi2_jax.runtime.chips import CHIPS
from qi2_jax.sharding import MeshShape
from tests.tpu import needs_libtpu

LAYERS, TOKENS, WIDTH, HIDDEN = 6, 256, 128, 512


@pytest.fixture(scope="module")
def mesh():
    return topology_mesh("v5e:2x2", MeshShape(fsdp=4))


def analysis_of(function, mesh, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return analyse(hlo.parse(compiled.as_text()), mesh.shape, 2e14, 8e11, lambda call, operands: 0.0, lambda axes: 4e10)


def array(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def layers(unroll):
    def body(x, weights):
        up, down = weights
        return x + jnp.tanh(x @ up) @ down, None

    return lambda x, up, down: jax.lax.scan(body, x, (up, down), unroll=unroll)[0]


@needs_libtpu
def test_loops_count_as_often_as_they_run(mesh):
    arguments = (
        array(mesh, (TOKENS, WIDTH)),
        array(mesh, (LAYERS, WIDTH, HIDDEN)),
        array(mesh, (LAYERS, HIDDEN, WIDTH)),
    )
    looped, unrolled = (analysis_of(layers(unroll), mesh, *arguments) for unroll in (1, LAYERS))
    assert looped.flops == unrolled.flops == LAYERS * 2 * 2 * TOKENS * WIDTH * HIDDEN
    # All weights are read once; activations this small need not leave the chip.
    weights = 2 * 2 * LAYERS * WIDTH * HIDDEN
    assert weights <= looped.hbm_bytes <= 1.5 * weights
    assert looped.collectives == ()


@needs_libtpu
def test_a_gradient_has_three_times_the_products_of_the_forward_pass(mesh):
    def loss(up, down, x):
        return jnp.sum(layers(1)(x, up, down).astype(jnp.float32) ** 2)

    arguments = (
        array(mesh, (LAYERS, WIDTH, HIDDEN)),
        array(mesh, (LAYERS, HIDDEN, WIDTH)),
        array(mesh, (TOKENS, WIDTH)),
    )
    found = analysis_of(jax.grad(loss, argnums=(0, 1, 2)), mesh, *arguments)
    assert found.flops == 3 * LAYERS * 4 * TOKENS * WIDTH * HIDDEN


@needs_libtpu
@pytest.mark.parametrize(
    ("stride", "dilation", "spacing", "padding"), list(itertools.product((1, 2), (1, 2), (1, 2), ((1, 1), (0, 2))))
)
def test_products_with_padding_and_holes_do_not_count(mesh, stride, dilation, spacing, padding):
    """As XLA counts them: every pair of an output and a place of the kernel that meets an input."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,), (padding,), (dilation,), (spacing,), ("NWC", "WIO", "NWC")
        )

    x, kernel = jnp.ones((2, 9, 4)), jnp.ones((3, 4, 8))
    # With ones everywhere, each pair contributes 1 to its output.
    pairs = float(convolve(x[..., :1], kernel[:, :1]).sum()) / (2 * 8)
    text = jax.jit(convolve).lower(x, kernel).compile().as_text()
    found = analyse(hlo.parse(text), mesh.shape, 2e14, 8e11, lambda call, operands: 0.0, lambda axes: 4e10)
    assert found.flops == 2 * 2 * 8 * 4 * pairs


@needs_libtpu
def test_collectives_have_kind_axes_and_bytes():
    mesh = topology_mesh("v5e:2x2", MeshShape(data=2, fsdp=2))
    x, weight = array(mesh, (64, WIDTH), ("data", "fsdp")), array(mesh, (WIDTH, HIDDEN), "fsdp")

    def function(x, weight):
        return jnp.sum((x @ weight).astype(jnp.float32), axis=0)

    found = analysis_of(function, mesh, x, weight).bytes_by()
    size = WIDTH * HIDDEN * 2
    assert found["all-gather", ("fsdp",)] == size / 2  # a chip has one half
    assert found["all-reduce", ("data", "fsdp")] == 2 * 3 / 4 * HIDDEN * 4


def test_a_collective_is_hidden_as_long_as_the_chip_computes_meanwhile():
    """A SparseCore gathers 3 x 4,096 bytes, while a product of 2 x 64 x 64 x 64 operations runs."""
    text = """
%called (given: f32[16,64]) -> f32[64,64] {
  %given = f32[16,64]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[64,64]{1,0} all-gather(%given), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[16,64], y: f32[64,64]) -> f32[64,64] {
  %x = f32[16,64]{1,0} parameter(0)
  %y = f32[64,64]{1,0} parameter(1)
  %start = ((f32[16,64]{1,0}), f32[64,64]{1,0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  %z = f32[64,64]{1,0:S(1)} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[64,64]{1,0} call-done(%start)
  ROOT %result = f32[64,64]{1,0} dot(%done, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    gathered, operations = 3 * 16 * 64 * 4, 2 * 64**3
    for seconds, hidden in ((1.0, 1.0), (2.0, 0.5)):
        found = analyse(
            hlo.parse(text), {"fsdp": 4}, operations, 1e9, lambda call, operands: 0.0, lambda axes: gathered / seconds
        )
        assert found.bytes_by() == {("all-gather", ("fsdp",)): gathered}
        assert found.overlapped == pytest.approx(hidden) and found.flops == 2 * operations
        assert bound_of(found, CHIPS["TPU v5 lite"]).exposed == pytest.approx(seconds - 1.0)


@needs_libtpu
def test_a_loop_that_depends_on_data_is_refused(mesh):
    def function(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    with pytest.raises(ValueError, match=r"the number of iterations of the loop .* is unknown"):
        analysis_of(function, mesh, array(mesh, (WIDTH, WIDTH)))


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="has no entry computation"):
        hlo.parse("HloModule nothing\n")


@needs_libtpu
@pytest.mark.parametrize(
    ("shape", "axes", "share"),
    [
        (MeshShape(data=16, fsdp=16), ("fsdp",), 1 / 2),  # a ring along one of the two dims of the torus
        (MeshShape(data=16, fsdp=16), ("data", "fsdp"), 1.0),
        (MeshShape(data=4, fsdp=16, tensor=4), ("tensor",), 1 / 4),  # a line: no link from its end to its start
    ],
)
def test_bandwidth_follows_the_links_of_the_torus(shape, axes, share):
    chip = CHIPS["TPU v6 lite"]
    assert bandwidth(topology_mesh("v6e:16x16", shape), axes, chip) == share * chip.ici_bandwidth
