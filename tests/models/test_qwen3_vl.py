"""The condition encoder against transformers, its tensor names, and its errors."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qi2_jax.interop import tensor_names
from qi2_jax.interop.components import read_config
from qi2_jax.interop.qwen3_vl import NAMES
from qi2_jax.models import tree
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.models.qwen3_vl.inputs import prepare_inputs
from qi2_jax.models.qwen3_vl.model import Qwen3VL
from tests.models import tiny_qwen3_vl as tiny

# For each prompt: sizes of its images in features, and lengths of the texts around them.
BATCHES = {
    "text_only": ([[], [], []], [(5,), (1,), (9,)]),
    "one_image": ([[(2, 3)]], [(3, 4)]),
    "images_of_several_sizes": ([[(2, 3), (1, 1), (1, 4)]], [(2, 1, 3, 2)]),
    "padded_on_the_left": ([[(2, 3), (1, 1)], [], [(4, 2)]], [(3, 4, 2), (5,), (1, 7)]),
}


@functools.cache
def model(shape):
    return tiny.build(tiny.published_config(shape))


def batch(config, kind, **padding):
    sizes, lengths = BATCHES[kind]
    prompts = [tiny.random_prompt(*pair, seed=i) for i, pair in enumerate(zip(sizes, lengths, strict=True))]
    flat = [size for own in sizes for size in own]
    patches, grids = tiny.random_images(config, flat, seed=0) if flat else (None, None)
    return prepare_inputs(config, prompts, patches, grids, **padding), patches, grids


def published_inputs(inputs, patches, grids):
    ids = torch.tensor(inputs.input_ids).long()
    arguments = dict(input_ids=ids, attention_mask=torch.tensor(inputs.valid).long())
    if grids is not None:
        arguments |= dict(pixel_values=torch.tensor(patches), image_grid_thw=torch.tensor(grids))
        arguments |= dict(mm_token_type_ids=(ids == tiny.IMAGE).int())
    return arguments


def relative_error(got, want):
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


@jax.jit
def forward(ours, inputs):
    return ours(inputs)


@pytest.mark.parametrize("shape", tiny.SHAPES)
@pytest.mark.parametrize("kind", ["text_only", "padded_on_the_left"])
def test_parity_of_hidden_states(shape, kind):
    theirs, ours, config = model(shape)
    inputs, patches, grids = batch(config, kind)
    want = tiny.hidden_state(theirs, **published_inputs(inputs, patches, grids))
    got = forward(ours, inputs)
    assert got.shape == want.shape
    assert relative_error(np.asarray(got)[inputs.valid], want[inputs.valid]) < 1e-5


@pytest.mark.parametrize("kind", BATCHES)
def test_parity_does_not_depend_on_the_shapes_padded_to(kind):
    theirs, ours, config = model("grouped_queries")
    inputs, patches, grids = batch(config, kind, length=32, image_count=4, patch_count=48)
    tight, _, _ = batch(config, kind)
    assert inputs.vision.patches.shape == (4, 48, config.vision.patch_dim)
    want = tiny.hidden_state(theirs, **published_inputs(tight, patches, grids))
    got = forward(ours, inputs)
    assert got.shape[1] == 32
    assert relative_error(np.asarray(got)[inputs.valid], want[tight.valid]) < 1e-5


@pytest.mark.parametrize("kind", BATCHES)
def test_parity_of_positions(kind):
    theirs, _, config = model("single_key_head")
    inputs, _, grids = batch(config, kind, length=32)
    arguments = published_inputs(inputs, np.zeros(0), np.zeros((0, 3), int) if grids is None else grids)
    want, _ = theirs.model.get_rope_index(
        arguments["input_ids"],
        arguments["mm_token_type_ids"],
        arguments["image_grid_thw"],
        attention_mask=arguments["attention_mask"],
    )
    np.testing.assert_array_equal(inputs.positions, want.numpy())


def test_bfloat16_weights_give_close_features():
    _, ours, config = model("grouped_queries")
    inputs, _, _ = batch(config, "padded_on_the_left")
    want = np.asarray(forward(ours, inputs))[inputs.valid]
    got = forward(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), ours), inputs)
    assert got.dtype == jnp.bfloat16
    error = np.asarray(got, np.float32)[inputs.valid] - want
    assert 0 < np.sqrt((error**2).mean() / (want**2).mean()) < 0.02


@pytest.mark.parametrize("tied", [False, True])
def test_parity_of_a_saved_folder(tmp_path, tied):
    published = tiny.published_config("as_many_key_heads", tie_word_embeddings=tied)
    theirs, ours, config = tiny.build(published)
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path, "text_encoder") == config
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    like = jax.eval_shape(functools.partial(Qwen3VL, config), key=jax.random.key(0))
    leaves = tensor_names.stack(tensors, tree.to_dict(like), NAMES)
    for name, leaf in tree.to_dict(ours).items():
        np.testing.assert_array_equal(leaves[name], leaf)
    back = {target for name, leaf in leaves.items() for target in NAMES.to_published(name, leaf.shape)}
    assert back == {name for name in tensors if not NAMES.is_passthrough(name)}


def test_constructor_makes_the_parameters_it_announces():
    _, _, config = model("as_many_key_heads")
    built = tree.to_dict(jax.jit(functools.partial(Qwen3VL, config))(key=jax.random.key(0)))
    abstract = tree.to_dict(jax.eval_shape(functools.partial(Qwen3VL, config), key=jax.random.key(0)))
    assert {name: leaf.shape for name, leaf in built.items()} == {name: leaf.shape for name, leaf in abstract.items()}
    layers = built["language_model.layers.mlp.up_proj.weight"]
    assert not np.array_equal(layers[0], layers[1])


def test_configuration_in_the_form_of_older_files():
    published = tiny.published_config("grouped_queries").to_dict()
    want = Qwen3VLConfig.from_dict(published)
    rope = published["text_config"].pop("rope_parameters")
    published["text_config"]["rope_theta"] = rope.pop("rope_theta")
    published["text_config"]["rope_scaling"] = rope | {"mrope_interleaved": True}
    published["vision_config"] |= {"model_type": "qwen3_vl", "rope_parameters": None}
    assert Qwen3VLConfig.from_dict(published) == want


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (None, {"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        ("text_config", {"model_type": "qwen3_vl_moe_text"}, "qwen3_vl_moe_text"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"hidden_act": "gelu"}, "gelu"),
        ("text_config", {"head_dim": None}, "head_dim"),
        ("text_config", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ("text_config", {"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ("text_config", {"rope_parameters": {"rope_theta": 1e4, "mrope_interleaved": False}}, "mrope_interleaved"),
        ("text_config", {"num_hidden_layers": 1}, "as many text layers"),
        ("vision_config", {"hidden_act": "silu"}, "silu"),
        ("vision_config", {"patch_size": [4, 4]}, "patch_size"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, "deepstack_visual_indexes"),
        ("vision_config", {"deepstack_visual_indexes": [3]}, "deepstack_visual_indexes"),
        ("vision_config", {"num_position_embeddings": 35}, "square"),
        ("vision_config", {"num_heads": 3}, "num_heads"),
        ("vision_config", {"out_hidden_size": 25}, "out_hidden_size"),
        ("vision_config", {"rope_parameters": {"rope_type": "linear"}}, "linear"),
    ],
)
def test_configurations_that_are_refused(part, fields, message):
    published = copy.deepcopy(tiny.published_config("grouped_queries").to_dict())
    target = published if part is None else published[part]
    target.update(fields)
    with pytest.raises(ValueError, match=message):
        Qwen3VLConfig.from_dict(published)


def test_missing_field_is_named():
    published = tiny.published_config("grouped_queries").to_dict()
    del published["vision_config"]["depth"]
    with pytest.raises(ValueError, match=r"vision_config lacks \['depth'\]"):
        Qwen3VLConfig.from_dict(published)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_config(tmp_path, "text_encoder")
    for content, message in [("{", "not valid JSON"), ("[]", "contains a list"), (" " * (1 << 21), "bytes")]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path, "text_encoder")


@pytest.mark.parametrize(
    ("prompts", "sizes", "padding", "message"),
    [
        ([[1, 2], []], [], {}, "no tokens"),
        ([[1] * 9], [], {"length": 8}, "length 8 is less than the 9"),
        ([[1]], [(1, 1)], {}, "have no image tokens"),
        ([[1, tiny.IMAGE, 2]], [], {}, "at token 1 does not have the 0 x 0"),
        ([[tiny.IMAGE] * 3], [(2, 2)], {}, "2 x 2"),
        ([[tiny.IMAGE] * 5], [(2, 2)], {}, "2 x 2"),
        ([[tiny.IMAGE] * 4], [(2, 2)], {"image_count": 0}, "image_count 0"),
        ([[tiny.IMAGE] * 4], [(2, 2)], {"patch_count": 12}, "patch_count 12"),
        ([[tiny.IMAGE] * 4], [(2, 2)], {"patch_count": 18}, "multiple of 4"),
    ],
)
def test_inputs_that_are_refused(prompts, sizes, padding, message):
    config = Qwen3VLConfig.from_dict(tiny.published_config("grouped_queries").to_dict())
    with pytest.raises(ValueError, match=message):
        prepare_inputs(config, prompts, *tiny.random_images(config, sizes, seed=0), **padding)


def test_patches_and_grids_must_agree():
    config = Qwen3VLConfig.from_dict(tiny.published_config("grouped_queries").to_dict())
    patches, grids = tiny.random_images(config, [(2, 2)], seed=0)
    with pytest.raises(ValueError, match="patches must have shape"):
        prepare_inputs(config, [[tiny.IMAGE] * 4], patches[1:], grids)
    with pytest.raises(ValueError, match="one frame"):
        prepare_inputs(config, [[tiny.IMAGE] * 8], np.repeat(patches, 2, axis=0), grids * [2, 1, 1])
