"""Loading weights onto a mesh of eight devices: sharded, read in slices, and equal to the published ones."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from qi2_jax import sharding
from qi2_jax.interop import components, stored_weights
from qi2_jax.interop.stored_weights import FileWeight
from qi2_jax.models import tree
from tests.models import tiny_qwen3_vl

COMPONENT = components.COMPONENTS["text_encoder"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def encoder(request, tmp_path_factory):
    """(folder, dtype, tensors read by transformers) of a Qwen3-VL in shards."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = tiny_qwen3_vl.build(tiny_qwen3_vl.published_config("grouped_queries", tie_word_embeddings=False))[0]
    theirs.to(getattr(torch, request.param)).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    read = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype="auto", local_files_only=True)
    assert read.dtype == getattr(torch, request.param)
    return folder, jnp.dtype(request.param), read.state_dict()


@pytest.fixture
def reads(monkeypatch):
    """Records the shapes of the slices that are read of each weight, in order."""
    shapes, read = collections.defaultdict(list), FileWeight.read

    def counted(self, index=(), dtype=None):
        part = read(self, index, dtype)
        shapes[self].append(part.shape)
        return part

    monkeypatch.setattr(FileWeight, "read", counted)
    return shapes


def open_encoder(folder):
    config = components.read_config(folder, "text_encoder")
    weights, _ = stored_weights.open_published(
        folder, COMPONENT.stem, COMPONENT.expected(config), COMPONENT.name_map(config)
    )
    return COMPONENT.abstract(config), COMPONENT.name_map(config), weights


def published_array(names, theirs, ours, shape):
    """A parameter of ours from the published tensors, in fp32, which represents all bf16 values."""
    published = names.to_published(ours, shape)
    layers = [theirs[name].float().numpy() for name in published]
    return np.stack(layers) if names.is_stacked(published[0]) else layers[0]


def test_parity_of_a_sharded_folder_put_onto_a_mesh(encoder, reads):
    folder, dtype, theirs = encoder
    like, names, weights = open_encoder(folder)
    placed = sharding.shardings(like, sharding.make_mesh(sharding.MeshShape(fsdp=4, tensor=2)))
    model = stored_weights.load(weights, like, placed)

    wanted = tree.to_dict(jax.tree.map(lambda place, part: jax.tree.map(lambda _: place, part), placed, like))
    divided = 0
    for name, leaf in tree.to_dict(model).items():
        place = wanted[name]
        assert leaf.sharding == place and leaf.dtype == dtype, name
        np.testing.assert_array_equal(
            np.asarray(leaf, np.float32), published_array(names, theirs, name, leaf.shape), err_msg=name
        )
        # Eight devices read their slices; replicated parameters are read once.
        part = place.shard_shape(leaf.shape)
        assert reads[weights[name]] == ([leaf.shape] if place.is_fully_replicated else [part] * 8), name
        divided += part != leaf.shape
    assert divided > 20


def test_parity_on_one_device_in_another_dtype(encoder):
    folder, _, theirs = encoder
    like, names, weights = open_encoder(folder)
    model = stored_weights.load(weights, like, dtype=jnp.bfloat16)
    for name, leaf in tree.to_dict(model).items():
        assert leaf.dtype == jnp.bfloat16
        want = torch.from_numpy(published_array(names, theirs, name, leaf.shape)).bfloat16().float().numpy()
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), want, err_msg=name)


def test_slices_of_stacked_and_single_tensors(encoder):
    folder, dtype, _ = encoder
    _, _, weights = open_encoder(folder)
    stacked, single = weights["language_model.layers.mlp.up_proj.weight"], weights["visual.patch_embed.proj.weight"]
    assert stacked.stacked and not single.stacked
    for weight in (stacked, single):
        whole = weight.read()
        assert whole.shape == weight.shape and whole.dtype == dtype and whole.flags.writeable
        for index in ((slice(1, 3),), (slice(None), slice(2, 7)), (slice(0, 1), slice(None), slice(1, 4))):
            np.testing.assert_array_equal(weight.read(index), whole[index])
    np.testing.assert_array_equal(stacked.part(2).open(), stacked.read()[2])
