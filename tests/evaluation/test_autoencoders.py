"""Which autoencoder a path contains, and that PyTorch and JAX reconstruct the same."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage
from flax import nnx

from data_pipeline.selection.index import INDEX, Selection, write_selection
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax import sharding
from qi2_jax.evaluation import autoencoders, torch_process
from qi2_jax.evaluation.autoencoders import JaxAutoencoder
from qi2_jax.evaluation.torch_process import TorchAutoencoder
from qi2_jax.inference import tiling
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.pixels import normalize, to_image
from qi2_jax.training import step
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_torch import autoencoder as torch_side


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def test_both_sides_reconstruct_the_same(published, imported, monkeypatch):
    ours, theirs = autoencoders.find(imported), autoencoders.find(published)
    assert isinstance(ours, JaxAutoencoder) and isinstance(theirs, TorchAutoencoder)
    assert (ours.factor, ours.channels) == (theirs.factor, theirs.channels) == (16, 16)
    images = noise(2, 32, 48)
    with ours.loaded() as a, theirs.loaded() as b:
        found, expected = a.reconstruct(images), b.reconstruct(images)
        again = b.reconstruct(images[:1])
        for name in ("MAX_ENCODED_WHOLE", "MAX_DECODED_WHOLE"):
            monkeypatch.setattr(tiling, name, 32 * 32)
        np.testing.assert_array_equal(a.reconstruct(images), found)  # in tiles
    assert found.shape == images.shape and found.std() > 1
    assert np.abs(found.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(again[0], expected[0])


@pytest.mark.parametrize(
    ("model", "factor", "channels"),
    [
        (AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                       up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4), 2, 4),
        (AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), 8, 4),
        (AutoencoderDC(latent_channels=8, attention_head_dim=4, encoder_block_out_channels=(8, 8),
                       decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
                       decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
                       decoder_qkv_multiscales=((), ())), 2, 8),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_published_classes_are_evaluated(tmp_path, model, factor, channels):
    model.save_pretrained(tmp_path / "vae")
    found = autoencoders.find(tmp_path)
    assert isinstance(found, TorchAutoencoder)
    assert (found.kind, found.factor, found.channels) == (type(model).__name__, factor, channels)
    images = noise(2, 16, 32)
    rebuilt = torch_side.Autoencoder(str(found.folder), found.kind).reconstruct(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = model.eval()(x[:, :, None] if found.kind in torch_side.OF_VIDEO else x, return_dict=False)[0]
    expected = ((y.reshape(x.shape) / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert rebuilt.dtype == np.uint8 and np.abs(rebuilt - expected).max() <= 1


def test_missing_packages_are_named_before_anything_is_computed(published, monkeypatch):
    monkeypatch.setattr(torch_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vae needs \['torch', 'diffusers'\]; pip install"):
        autoencoders.find(published)


def test_weights_of_a_pickle_and_other_classes_are_refused(tmp_path, published):
    folder = tmp_path / "vae"
    shutil.copytree(published / "vae", folder)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "AutoencoderTiny"}, "describes a 'AutoencoderTiny'; supported autoencoders are"),
        ({"quantization_config": {}}, "has a quantization_config"),
        ({"temperal_downsample": [True] * 40}, "must be a list of at most 8 entries"),
        ({"z_dim": "64"}, "z_dim is '64'; it must be an integer"),
        ({"patch_size": -2}, "patch_size is -2"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            autoencoders.find(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        autoencoders.find(folder)
    with pytest.raises(ValueError, match="is neither a run"):
        autoencoders.find(tmp_path / "missing")


def test_a_process_that_fails_says_why(tmp_path, published):
    folder = tmp_path / "vae"
    shutil.copytree(published / "vae", folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with (
        autoencoders.find(folder).loaded() as model,
        pytest.raises(ValueError, match=r"diffusers could not run .*\n(.*\n)*.*Error"),
    ):
        model.reconstruct(noise(1, 16, 16))


def test_part_of_a_model_folder_is_the_same_model(imported):
    whole, part = autoencoders.find(imported), autoencoders.find(imported / "vae")
    assert whole.config == part.config and whole.digest == part.digest and not whole.trained_on


def test_a_run_of_the_autoencoder_is_its_newest_checkpoint(tmp_path):
    config = VAEConfig(4, 4, 8, (1, 1), 1, (True,), in_channels=3, out_channels=3)
    raw, ema = (VAE(config, key=jax.random.key(seed)) for seed in (0, 1))
    ema.projection = nnx.Param(jax.numpy.ones((2, 2)), axes=(None, None))  # a parameter that only the loss uses
    raw.projection = nnx.Param(jax.numpy.ones((2, 2)), axes=(None, None))
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config), "loss": "absolute"}))
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        autoencoders.find(tmp_path)
    state = step.init_state(lambda _: raw, optax.adam(0.1), jax.random.key(0), mesh)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state._replace(step=jax.numpy.int32(5), ema=ema))
    checkpoints.close()
    write_selection(tmp_path / INDEX, Selection(Thresholds(), (), {}, (), {}, {}, "digest of the records"))
    images = noise(1, 16, 16)
    expected = {item: np.asarray(model.decode(model.encode(normalize(images)).mean))
                for item, model in (("ema", ema), ("model", raw))}  # fmt: skip
    digests = set()
    for path, name in ((tmp_path, f"{tmp_path}@5"), (tmp_path / "checkpoints" / "5", f"{tmp_path}/checkpoints/5")):
        for item, pixels in expected.items():
            found = autoencoders.find(path, item)
            assert found.name == f"{name} ({item})" and found.trained_on == {"digest of the records"}
            digests.add((item, found.digest))
            assert (found.factor, found.channels) == (2, 8)
            with found.loaded() as model:
                difference = model.reconstruct(images)[0].astype(int) - to_image(pixels[0])
            assert np.abs(difference).max() <= 1
    assert len(digests) == 2 and len({digest for _, digest in digests}) == 2
    assert np.abs(expected["ema"] - expected["model"]).max() > 0.1
    with pytest.raises(ValueError, match=r"6 is not a complete checkpoint; .* has those of the steps \[5\]"):
        autoencoders.find(tmp_path / "checkpoints" / "6")


def test_weights_that_are_not_finite_are_named(imported):
    with autoencoders.find(imported).loaded() as model:
        broken = jax.tree.map(lambda leaf: leaf * np.nan, model.vae)
        with pytest.raises(ValueError, match="NaN or infinity"):
            autoencoders.LoadedJaxAutoencoder(broken).reconstruct(noise(1, 16, 16))
