"""Random adapters, in memory and as tensors of a file, and what diffusers makes of a file."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import torch

from qi2_jax.interop import mmdit as names
from qi2_jax.models import lora
from qi2_jax.models.lora import LoRAConfig
from tests.models.test_mmdit import Sample, batch, relative, torch_forward

ALL = LoRAConfig(4, 6.0, ("*",))
CONFIGS = {
    "attention": LoRAConfig(3, 12.0, ("blocks.attn.*",)),
    "everything": ALL,
    "no_block": LoRAConfig(2, 0.5, ("text_in.*", "modulation", "image_out")),
}

# {published layer: (out, in, rank, alpha)} of an adapter as people have them: some blocks, several ranks and alphas.
LAYERS = {
    "transformer_blocks.0.attn.to_q": (32, 32, 2, 4.0),
    "transformer_blocks.0.attn.to_out.0": (32, 32, 3, 1.5),
    "transformer_blocks.1.attn.to_q": (32, 32, 4, 4.0),
    "transformer_blocks.1.img_mlp.proj": (96, 32, 1, 0.75),
    "transformer_blocks.1.img_mlp.out": (32, 96, 4, 8.0),
    "img_in": (32, 16, 2, 2.0),
    "norm_out.linear": (32, 32, 3, 6.0),
    "time_text_embed.timestep_embedder.linear_1": (32, 256, 2, 1.0),
}
# diffusers cannot split the flattened names of these.
MORE_LAYERS = {
    "transformer_blocks.0.img_mlp.gate_layer": (96, 32, 2, 4.0),
    "modulation.1": (128, 32, 2, 3.0),
    "txt_in.in_layer": (32, 16, 3, 4.0),
}


def random_adapter(base, config, seed=0):
    """As after some training: B is not zero."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7 * leaf.shape[-1] ** -0.5, jnp.float32)
    return jax.tree.map(draw, lora.abstract(base, config))


def random_factors(layers=LAYERS, seed=0):
    """{published layer: (A, B, alpha)}."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy((rng.normal(size=shape) * 0.7 * shape[-1] ** -0.5).astype(np.float32))
    return {name: (draw(rank, width), draw(out, rank), alpha) for name, (out, width, rank, alpha) in layers.items()}


def spelt(factors, name="transformer.{}.lora_{}.weight", *, down="A", up="B", alpha=None, flat=False):
    """The tensors of a file.

    Args:
      factors: {published layer: (A, B, alpha)}.
      name: the name of a factor, with places for its layer and for `down` or `up`.
      alpha: the name of an alpha, with a place for its layer; None: the file has none.
      flat: whether the dots of layers become underscores.
    """
    tensors = {}
    for layer, (a, b, value) in factors.items():
        layer = layer.replace(".", "_") if flat else layer
        tensors |= {name.format(layer, down): a, name.format(layer, up): b}
        tensors |= {} if alpha is None else {alpha.format(layer): torch.tensor(value)}
    return tensors


def sample_of(base_config):
    """One edit, as both sides need it."""
    sample = Sample.random(base_config, 1, seed=5)
    return sample, batch([sample])


@contextlib.contextmanager
def loaded(pipeline, *files_and_scales):
    """diffusers' pipeline with adapters, by path and scale."""
    try:
        for index, (file, _) in enumerate(files_and_scales):
            pipeline.load_lora_weights(file, adapter_name=f"adapter{index}")
        names = [f"adapter{index}" for index in range(len(files_and_scales))]
        pipeline.set_adapters(names, [scale for _, scale in files_and_scales])
        yield pipeline
    finally:
        pipeline.unload_lora_weights()


def their_output(pipeline, base_config):
    with torch.no_grad():
        return torch_forward(pipeline.transformer, sample_of(base_config)[0], 0.6).numpy()


def fused_weights(pipeline):
    """{published name: array} of the transformer, adapters merged by diffusers and peft."""
    pipeline.fuse_lora()
    state = pipeline.transformer.state_dict()
    found = {key.replace(".base_layer", ""): value.numpy().copy() for key, value in state.items()}
    pipeline.unfuse_lora()
    return {key: value for key, value in found.items() if ".lora_" not in key}


def assert_same_weights(ours, theirs):
    """Compares {our name: array} with {published name: array}."""
    count = 0
    for name, leaf in ours.items():
        for layer, key in enumerate(names.NAMES.to_published(name, leaf.shape)):
            count += 1
            assert relative(leaf[layer] if names.NAMES.is_stacked(key) else leaf, theirs[key]) <= 1e-5, key
    assert count == len(theirs)
