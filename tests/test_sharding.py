"""Meshes over several slices of fake chips; `planning/test_compile.py` uses real topologies."""

import dataclasses
import itertools

import jax
import pytest

from qi2_jax import sharding
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.tasks.devices import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU device that `make_mesh` reads."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    core_on_chip: int = 0
    process_index: int = 0
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"


def chips(slices: int, side: int = 4, numbers=None) -> list[Chip]:
    """Chips of `slices` slices of side x side; slices are numbered from 0, or by `numbers`."""
    places = itertools.product(numbers or range(slices), range(side), range(side))
    return [Chip(place, (x, y, 0), number) for place, (number, y, x) in enumerate(places)]


def slices_by_data(mesh) -> list[set[int]]:
    return [{chip.slice_index for chip in row.flat} for row in mesh.devices]


@pytest.mark.parametrize(
    ("shape", "slices", "expected"),
    [
        (sharding.MeshShape(data=4, fsdp=16), 4, [{0}, {1}, {2}, {3}]),
        (sharding.MeshShape(data=4, fsdp=4, tensor=4), 4, [{0}, {1}, {2}, {3}]),
        (sharding.MeshShape(data=4, fsdp=8), 2, [{0}, {0}, {1}, {1}]),  # two indices per slice
        (sharding.MeshShape(data=32), 2, [{0}] * 16 + [{1}] * 16),
        (sharding.MeshShape(data=2, fsdp=8, tensor=1), 1, [{0}, {0}]),
    ],
)
def test_fsdp_and_tensor_stay_within_a_slice(shape, slices, expected):
    devices = chips(slices)
    mesh = sharding.make_mesh(shape, devices)
    assert dict(mesh.shape) == dataclasses.asdict(shape)
    assert slices_by_data(mesh) == expected
    assert set(mesh.devices.flat) == set(devices)
    # The order of the devices does not matter.
    assert slices_by_data(sharding.make_mesh(shape, devices[::-1])) == expected
    assert slices_by_data(make_mesh(shape, devices)) == expected


def test_chips_of_one_slice_of_a_job_of_several():
    """A process that encodes uses its local chips alone."""
    host = [chip for chip in chips(4, side=2) if chip.slice_index == 3]
    assert slices_by_data(sharding.make_mesh(sharding.MeshShape(data=4), host)) == [{3}] * 4


def test_slices_of_other_platforms_do_not_matter():
    hosts = [dataclasses.replace(chip, platform="gpu", device_kind="GPU") for chip in chips(2, side=2)]
    assert sharding.chips_of_slices(hosts) == {}
    assert sharding.make_mesh(sharding.MeshShape(fsdp=8), hosts).shape["fsdp"] == 8


@pytest.mark.parametrize(
    "shape", [sharding.MeshShape(fsdp=64), sharding.MeshShape(data=2, fsdp=32), sharding.MeshShape(2, 4, 8)]
)
def test_a_mesh_that_does_not_split_over_its_slices_is_refused_with_the_way_out(shape):
    message = f"data={shape.data} x fsdp={shape.fsdp} x tensor={shape.tensor} does not split over 4 slices of 16 chips"
    with pytest.raises(ValueError, match=f"{message}.*such as data=4 x fsdp=16 x tensor=1"):
        sharding.make_mesh(shape, chips(4))


def test_slices_of_different_size_are_refused():
    devices = chips(1, side=4) + chips(1, side=2, numbers=[1])
    with pytest.raises(ValueError, match=r"slices of equal size, but slice -> chips is \{0: 16, 1: 4\}"):
        sharding.make_mesh(sharding.MeshShape(data=2, fsdp=10), devices)


def unsharded_weights(config: MMDiTConfig, shape: sharding.MeshShape) -> list[str]:
    hosts = [dataclasses.replace(chip, platform="cpu", device_kind="cpu") for chip in chips(1, side=32)]
    mesh = sharding.make_mesh(shape, hosts[: shape.size])
    return sharding.unsharded_weights(jax.eval_shape(lambda: MMDiT(config, key=jax.random.key(0))), mesh)


@pytest.mark.parametrize("shape", [sharding.MeshShape(4, 256, 1), sharding.MeshShape(4, 64, 4)])
def test_the_published_sizes_split_over_the_meshes_of_the_stages(shape):
    assert unsharded_weights(MMDiTConfig(), shape) == []


def test_large_weights_that_an_axis_does_not_split_are_named():
    (line,) = unsharded_weights(MMDiTConfig(), sharding.MeshShape(fsdp=4, tensor=3))
    assert line.startswith("mesh.tensor=3 does not split ")
    assert "blocks.attn.q.weight [32, 4096, 4096] by its dim of 4096" in line
    assert "mlp" not in line  # 12,288 is a multiple of 3
    assert "image_in" not in line and "norm" not in line  # small, or never sharded


def test_an_axis_that_splits_no_large_weight_is_refused():
    with pytest.raises(ValueError, match=r"mesh.fsdp=3 divides no large weight .*blocks.attn.q.weight \[32, 4096"):
        unsharded_weights(MMDiTConfig(), sharding.MeshShape(fsdp=3, tensor=2))


def test_small_models_are_sharded_where_possible_without_a_warning():
    small = MMDiTConfig(layers=2, heads=3, head_width=32, rope_dims=(8, 12, 12), text_width=48)
    assert unsharded_weights(small, sharding.MeshShape(fsdp=5, tensor=7)) == []


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (5, 8)])
def test_padded_size_fills_every_batch_shard(count, size):
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))
    assert sharding.padded_size(mesh, count) == size
