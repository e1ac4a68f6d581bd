"""Adapters of each format have the same effect here as in diffusers and peft."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImage21Pipeline
from diffusers.loaders.single_file_utils import convert_qwen_image21_transformer_checkpoint_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.interop import stored_weights
from qi2_jax.interop.lora import merging, reading
from qi2_jax.models import tree
from tests import tiny_pipeline
from tests.interop.lora import adapters
from tests.models.test_mmdit import relative, run

FORMATS = {  # arguments of `spelt`
    "diffusers": {},
    "diffusers_old": dict(name="transformer.{}.lora.{}.weight", down="down", up="up"),
    "comfyui": dict(name="diffusion_model.{}.lora_{}.weight", down="down", up="up", alpha="diffusion_model.{}.alpha"),
    "comfyui_without_alpha": dict(name="diffusion_model.{}.lora_{}.weight"),
    "comfyui_alpha_with_a_and_b": dict(name="diffusion_model.{}.lora_{}.weight", alpha="diffusion_model.{}.alpha"),
    "named_default": dict(name="{}.lora_{}.default.weight"),
    "kohya": dict(name="lora_unet_{}.lora_{}.weight", down="down", up="up", alpha="lora_unet_{}.alpha", flat=True),
}


def merged(base, config, *files_and_scales):
    """{our name: array} of a model with adapters, read as `Pipeline.load` does."""
    weights = {name: stored_weights.ArrayWeight(np.asarray(leaf)) for name, leaf in tree.to_dict(base).items()}
    for file, scale in files_and_scales:
        weights = merging.merged(weights, merging.scaled(reading.read(file, config), scale))
    return {name: weight.read() for name, weight in weights.items()}


def assert_same_effect(ours, theirs, base_config, *files_and_scales):
    """Outputs and merged weights agree with those of diffusers after `load_lora_weights` and `set_adapters`."""
    _, (layout, target, given) = adapters.sample_of(base_config)
    found = merged(ours.transformer, base_config, *files_and_scales)
    with adapters.loaded(theirs, *files_and_scales):
        want = adapters.their_output(theirs, base_config)
        adapters.assert_same_weights(found, adapters.fused_weights(theirs))
    arguments = (layout, target, jnp.asarray([0.6]), given)
    assert relative(run(ours.transformer, *arguments)[0], want) > 0.05, "the adapter must matter"
    model = tree.from_dict(ours.transformer, {name: jnp.asarray(array) for name, array in found.items()})
    assert relative(run(model, *arguments)[0], want) <= 1e-5


@pytest.mark.parametrize("name", ["{}.lora_{}.mine-2.weight", "pipe.dit.{}.lora_{}.default.weight"])
def test_names_that_diffusers_does_not_read_have_the_same_effect(base_config, name, tmp_path):
    for file, spelling in (("plain", {}), ("named", {"name": name})):
        save_file(adapters.spelt(adapters.random_factors(), **spelling), tmp_path / f"{file}.safetensors")
    plain, named = (reading.read(tmp_path / f"{file}.safetensors", base_config) for file in ("plain", "named"))
    assert plain.keys() == named.keys()
    for path, layers in plain.items():
        for layer, change in layers.items():
            np.testing.assert_array_equal(change.b @ change.a, named[path][layer].b @ named[path][layer].a)


def test_a_folder_with_one_file_of_any_name_is_an_adapter_for_every_command(base_config, imported, tmp_path):
    save_file(adapters.spelt(adapters.random_factors()), tmp_path / "my_style.safetensors")
    assert reading.is_adapter(tmp_path) and reading.read(tmp_path, base_config)
    assert not reading.is_adapter(imported) and not reading.is_adapter(imported / "transformer")


@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("name", FORMATS)
def test_parity_of_formats(ours, theirs, base_config, name, scale, tmp_path):
    file = tmp_path / "adapter.safetensors"
    save_file(adapters.spelt(adapters.random_factors(), **FORMATS[name]), file)
    assert_same_effect(ours, theirs, base_config, (file, scale))


@pytest.mark.parametrize("code", [torch.bfloat16, torch.float16])
def test_parity_of_narrow_dtypes(ours, theirs, base_config, code, tmp_path):
    """Factors are widened before they are multiplied, as in an fp32 model of diffusers."""
    tensors = adapters.spelt(adapters.random_factors())
    save_file({name: tensor.to(code) for name, tensor in tensors.items()}, tmp_path / "adapter.safetensors")
    assert_same_effect(ours, theirs, base_config, (tmp_path / "adapter.safetensors", 1.0))


def test_parity_of_several_adapters(ours, theirs, base_config, tmp_path):
    for seed, name in enumerate(("comfyui", "kohya")):
        tensors = adapters.spelt(adapters.random_factors(seed=seed), **FORMATS[name])
        save_file(tensors, tmp_path / f"{name}.safetensors")
    both = [(tmp_path / "comfyui.safetensors", 0.8), (tmp_path / "kohya.safetensors", -1.3)]
    assert_same_effect(ours, theirs, base_config, *both)


def test_a_pipeline_loads_with_adapters(ours, imported, base_config, tmp_path):
    save_file(adapters.spelt(adapters.random_factors()), tmp_path / "adapter.safetensors")
    loras = [(tmp_path / "adapter.safetensors", 0.5)]
    found = tree.to_dict(Pipeline.load(imported, dtype=jnp.float32, loras=loras).transformer)
    for name, array in merged(ours.transformer, base_config, *loras).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


PATTERNS = dict(
    r=2,
    lora_alpha=3,
    target_modules=["to_q", "to_out.0", "img_mlp.proj", "img_in"],
    rank_pattern={"^transformer_blocks.0.attn.to_q": 4, "img_mlp.proj": 3},
    alpha_pattern={r".*\.attn\.to_q": 5, "img_in": 1.5},
)


def randomized(model, seed=0):
    """A model whose adapter's factors are random: B begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def fresh_transformer(theirs):
    """Another transformer with the pipeline's weights."""
    model = tiny_pipeline.randomize(type(theirs.transformer).from_config(theirs.transformer.config), 1)
    model.load_state_dict(theirs.transformer.state_dict())
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_parity_of_a_folder_of_peft(ours, theirs, base_config, rslora, tmp_path):
    """Ranks and alphas by pattern, in the JSON file beside the weights."""
    model = randomized(get_peft_model(fresh_transformer(theirs), LoraConfig(**PATTERNS, use_rslora=rslora)))
    model.save_pretrained(tmp_path / "saved")
    found = merged(ours.transformer, base_config, (tmp_path / "saved", 1.0))
    file = tmp_path / "saved" / reading.PEFT_FILE
    for name, array in merged(ours.transformer, base_config, (file, 1.0)).items():
        np.testing.assert_array_equal(found[name], array)
    want = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    adapters.assert_same_weights(found, want)
    change = merging.each(reading.read(file, base_config))
    scales = {(path, layer): item.scale for path, layer, item in change}
    divisor = math.sqrt if rslora else float
    assert scales["blocks.attn.q", 0] == pytest.approx(5 / divisor(4))
    assert scales["blocks.mlp.up", 1] == pytest.approx(3 / divisor(3))
    assert scales["image_in", None] == pytest.approx(1.5 / divisor(2))


@pytest.mark.parametrize("rslora", [False, True])
def test_parity_of_a_header_of_diffusers(ours, theirs, base_config, rslora, tmp_path):
    """Ranks and alphas by pattern, in the header that `save_lora_weights` writes."""
    model, config = fresh_transformer(theirs), LoraConfig(**PATTERNS, use_rslora=rslora)
    model.add_adapter(config)
    tensors = get_peft_model_state_dict(randomized(model))
    QwenImage21Pipeline.save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=config.to_dict())
    assert_same_effect(ours, theirs, base_config, (tmp_path, 0.6))


def test_parity_of_fused_layers_of_comfyui(ours, base_config, theirs, tmp_path):
    """An adapter of `gate_up` is that of two of our layers, as diffusers splits ComfyUI's weights."""
    layers = {"transformer_blocks.1.img_mlp.gate_up": (192, 32, 3, 6.0)}
    factors = adapters.random_factors(layers)
    save_file(adapters.spelt(factors, **FORMATS["comfyui"]), tmp_path / "adapter.safetensors")
    checkpoint = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    gate, up = (checkpoint.pop(f"transformer_blocks.1.img_mlp.{part}.weight") for part in ("gate_layer", "proj"))
    ((a, b, alpha),) = factors.values()
    checkpoint["model.diffusion_model.transformer_blocks.1.img_mlp.gate_up.weight"] = (
        torch.cat([gate, up]) + alpha / 3 * b @ a
    )
    want = convert_qwen_image21_transformer_checkpoint_to_diffusers(checkpoint)
    found = merged(ours.transformer, base_config, (tmp_path / "adapter.safetensors", 1.0))
    adapters.assert_same_weights(found, {name: tensor.numpy() for name, tensor in want.items()})


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "lycoris_"])
def test_every_layer_has_one_flattened_name(ours, theirs, base_config, prefix, tmp_path):
    """Also those that diffusers cannot split; the expected change is formed by hand."""
    factors = adapters.random_factors(adapters.LAYERS | adapters.MORE_LAYERS)
    spelling = FORMATS["kohya"] | dict(name=prefix + "{}.lora_{}.weight", alpha=prefix + "{}.alpha")
    save_file(adapters.spelt(factors, **spelling), tmp_path / "adapter.safetensors")
    want = {name: tensor.numpy().copy() for name, tensor in theirs.transformer.state_dict().items()}
    for layer, (a, b, alpha) in factors.items():
        want[f"{layer}.weight"] += alpha / len(a) * (b @ a).numpy()
    found = merged(ours.transformer, base_config, (tmp_path / "adapter.safetensors", 1.0))
    adapters.assert_same_weights(found, want)


def test_an_alpha_may_be_an_integer(base_config, tmp_path):
    tensors = adapters.spelt(adapters.random_factors(), **FORMATS["comfyui"])
    tensors["diffusion_model.img_in.alpha"] = torch.tensor(5)
    save_file(tensors, tmp_path / "adapter.safetensors")
    assert reading.read(tmp_path / "adapter.safetensors", base_config)["image_in"][None].scale == 2.5
