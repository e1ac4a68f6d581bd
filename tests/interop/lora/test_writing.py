"""Exported adapters against peft and diffusers, and read back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImage21Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qi2_jax.interop import mmdit as names
from qi2_jax.interop.lora import merging, reading, writing
from qi2_jax.models import lora, tree
from qi2_jax.models.lora import LoRAConfig
from tests import tiny_pipeline
from tests.interop import safetensors_bytes
from tests.interop.lora import adapters
from tests.interop.lora.adapters import ALL, CONFIGS, random_adapter, sample_of
from tests.models.test_mmdit import relative, run, torch_forward


def their_layer(path):
    """The published path of the first of a layer's matrices, without the block's."""
    published, _ = names.NAMES.to_published(f"{path}.weight", (1,))[0].rsplit(".", 1)
    return published.removeprefix("transformer_blocks.0.")


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_of_an_exported_adapter(ours, theirs, base_config, name, tmp_path):
    """diffusers with the exported file computes what the joined model computes, and fused what the merged one holds."""
    config, (sample, (layout, target, given)) = CONFIGS[name], sample_of(base_config)
    adapter = random_adapter(ours.transformer, config)
    file = writing.export_lora(adapter, config, tmp_path / "out")
    time = jnp.asarray([0.6])
    plain = run(ours.transformer, layout, target, time, given)
    joined = run(lora.join(ours.transformer, adapter), layout, target, time, given)
    merged = lora.merge(ours.transformer, adapter)
    try:
        theirs.load_lora_weights(file)
        with torch.no_grad():
            want = torch_forward(theirs.transformer, sample, 0.6).numpy()
        theirs.fuse_lora()
        state = theirs.transformer.state_dict()
        fused = {key.replace(".base_layer", ""): value.numpy().copy() for key, value in state.items()}
    finally:
        theirs.unfuse_lora()
        theirs.unload_lora_weights()
    assert relative(plain[0], want) > 0.05, "the adapter must matter"
    assert relative(joined[0], want) <= 1e-5
    assert relative(run(merged, layout, target, time, given)[0], want) <= 1e-5
    for ours_name, leaf in tree.to_dict(merged).items():
        published = names.NAMES.to_published(ours_name, leaf.shape)
        for layer, key in enumerate(published):
            assert relative(leaf[layer] if names.NAMES.is_stacked(key) else leaf, fused[key]) <= 1e-5, key


def test_parity_of_a_whole_image(ours, theirs, tmp_path):
    text, noise = "A red fox 🦊, reading “{a} book”.", np.random.default_rng(0).normal(size=(1, 24, 16))
    adapter = random_adapter(ours.transformer, ALL, seed=1)
    joined = dataclasses.replace(ours, transformer=lora.join(ours.transformer, adapter))
    theirs.load_lora_weights(writing.export_lora(adapter, ALL, tmp_path / "out"))
    options = {"width": 96, "height": 64, "num_inference_steps": 3}
    latents = torch.from_numpy(noise.astype(np.float32))
    want = np.asarray(theirs(text, latents=latents, **options).images[0]).astype(int)
    theirs.unload_lora_weights()
    without = np.asarray(theirs(text, latents=latents, **options).images[0]).astype(int)
    (got,) = joined([text], sizes=[(96, 64)], steps=3, latents=noise.astype(np.float32))
    assert np.abs(want - without).max() > 20, "the adapter must matter"
    assert np.abs(got.astype(int) - want).max() <= 1


def peft_model(base, adapter, config):
    """The published transformer under peft, with the values of our adapter."""
    model = get_peft_model(
        tiny_pipeline.randomize(type(base).from_config(base.config), 1),
        LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=[their_layer(path) for path in adapter]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                key, layer = names.NAMES.to_ours(name.removeprefix("base_model.model.").replace(".default", ""))
                leaf = np.array(tree.to_dict(adapter)[key])
                parameter.copy_(torch.from_numpy(leaf if layer is None else leaf[layer]))
    return model


def test_parity_of_gradients_with_peft(ours, theirs, base_config):
    sample, (layout, target, given) = sample_of(base_config)
    adapter = random_adapter(ours.transformer, ALL, seed=2)
    model = peft_model(theirs.transformer, adapter, ALL)
    (torch_forward(model, sample, 0.4) ** 2).mean().backward()
    arrays = (target, jnp.asarray([0.4]), given)
    loss = lambda adapter: jnp.mean(lora.join(ours.transformer, adapter)(layout, *arrays) ** 2)
    gradients = tree.to_dict(jax.jit(jax.grad(loss))(adapter))
    count = 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name)
        if parameter.grad is not None:
            key, layer = names.NAMES.to_ours(name.removeprefix("base_model.model.").replace(".default", ""))
            got = gradients[key] if layer is None else gradients[key][layer]
            assert relative(got, parameter.grad.numpy()) <= 1e-4, name
            count += 1
    assert count == 2 * (7 * base_config.layers + 8)


def assert_reads_back(folder, base_config, adapter, config, dtype=jnp.float32):
    """The file holds an adapter's factors and scale."""
    found, leaves = reading.read(folder, base_config), tree.to_dict(adapter)
    assert found.keys() == adapter.keys()
    for path, layer, change in merging.each(found):
        index = () if layer is None else layer
        for factor, array in (("A", change.a), ("B", change.b)):
            want = leaves[f"{path}.lora_{factor}.weight"][index].astype(dtype)
            np.testing.assert_array_equal(array, want.astype(jnp.float32))
        assert change.scale == config.scale


@pytest.mark.parametrize("code", [None, "BF16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_of_our_files(ours, base_config, name, code, tmp_path):
    config = CONFIGS[name]
    adapter = random_adapter(ours.transformer, config)
    writing.export_lora(adapter, config, tmp_path / "out", code)
    assert_reads_back(tmp_path / "out", base_config, adapter, config, jnp.bfloat16 if code else jnp.float32)


def test_round_trip_of_a_file_of_diffusers(ours, theirs, base_config, tmp_path):
    """Loaded and saved by diffusers, our file keeps every tensor's bytes and its scale."""
    adapter = random_adapter(ours.transformer, ALL)
    file = writing.export_lora(adapter, ALL, tmp_path / "out")
    theirs.load_lora_weights(file)
    parameters = {
        name.replace(".default_0", ""): value.contiguous()
        for name, value in theirs.transformer.state_dict().items()
        if ".lora_" in name
    }
    values = theirs.transformer.peft_config["default_0"].to_dict()
    theirs.unload_lora_weights()
    QwenImage21Pipeline.save_lora_weights(tmp_path / "saved", parameters, transformer_lora_adapter_metadata=values)
    assert safetensors_bytes.read(tmp_path / "saved" / reading.FILE) == safetensors_bytes.read(file)
    assert_reads_back(tmp_path / "saved", base_config, adapter, ALL)


def test_without_a_scale_alpha_is_the_rank(ours, base_config, tmp_path):
    file = writing.export_lora(random_adapter(ours.transformer, ALL), ALL, tmp_path / "out")
    save_file(load_file(file), tmp_path / "bare.safetensors")
    scales = {change.scale for _, _, change in merging.each(reading.read(tmp_path / "bare.safetensors", base_config))}
    assert scales == {1.0}


def test_an_export_does_not_overwrite(ours, tmp_path):
    adapter = random_adapter(ours.transformer, ALL)
    writing.export_lora(adapter, ALL, tmp_path / "out")
    with pytest.raises(ValueError, match="already exists"):
        writing.export_lora(adapter, ALL, tmp_path / "out")


@pytest.mark.parametrize("second", ["everything", "attention"])
def test_parity_of_two_adapters_as_one(ours, theirs, base_config, second, tmp_path):
    """Two adapters of different layers, ranks and scales: the one that contains both has the effect of both."""
    first = random_adapter(ours.transformer, ALL, seed=4), ALL
    other = random_adapter(ours.transformer, CONFIGS[second], seed=5), CONFIGS[second]
    both = [merging.changes_of(tree.to_dict(adapter), config) for adapter, config in (first, other)]
    file = writing.export_changes(merging.concatenated(both), tmp_path / "out")
    want = lora.merge(lora.merge(ours.transformer, first[0]), other[0])
    with adapters.loaded(theirs, (file, 1.0)):
        adapters.assert_same_weights(tree.to_dict(want), adapters.fused_weights(theirs))
    ranks = {(path, change.rank) for path, _, change in merging.each(reading.read(file, base_config))}
    assert ("blocks.attn.q", 4 + CONFIGS[second].rank) in ranks
    assert ("blocks.mlp.up", 8 if second == "everything" else 4) in ranks


def test_several_adapters_of_one_scale_are_concatenated_bit_for_bit(ours):
    """With alpha equal to the rank, nothing is rounded."""
    config = LoRAConfig(2, 2.0, ("modulation",))
    changes = [
        merging.changes_of(tree.to_dict(random_adapter(ours.transformer, config, seed)), config) for seed in (1, 2)
    ]
    (found,) = merging.concatenated(changes)["modulation"].values()
    first, second = (part["modulation"][None] for part in changes)
    np.testing.assert_array_equal(found.a, np.concatenate([first.a, second.a]))
    np.testing.assert_array_equal(found.b, np.concatenate([first.b, second.b], axis=1))
