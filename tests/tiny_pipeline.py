"""A complete published pipeline of tiny random models, created by the published code."""

import copy
import functools
import json
import pathlib
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel

from qi2_jax.text.qwen_tokenizer import save_qwen_processor
from tests.models import tiny_qwen3_vl

SCHEDULER = dict(
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=0.9,
    base_image_seq_len=256,
    max_image_seq_len=8192,
    shift_terminal=0.02,
)
INDEX = {
    "_class_name": "QwenImage21Pipeline",
    "_diffusers_version": "0.42.1",
    "processor": ["transformers", "Qwen3VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage21"],
}
LATENT_CHANNELS = 16


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Randomises all parameters, norms and biases included, to about the size of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            is_scale = "gamma" in name or "norm_q" in name or "norm_k" in name
            scale = 0.1 if is_scale or parameter.ndim == 1 else fan_in**-0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + float(is_scale))
    return model.eval()


@functools.cache
def build(image_channels: int = 4, causal_condition: bool = True) -> dict[str, torch.nn.Module]:
    """The published models in fp32, by component; shared, so do not change them."""
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1 * i - 0.8 for i in range(LATENT_CHANNELS)],
        latents_std=[0.5 + 0.1 * i for i in range(LATENT_CHANNELS)],
        in_channels=image_channels,
        out_channels=image_channels,
    )
    transformer = QwenImage21Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
        causal_condition=causal_condition,
    )
    encoder = tiny_qwen3_vl.published_config("patches_of_qwen", vocabulary=151936, tie_word_embeddings=False)
    return {
        "transformer": randomize(transformer, 1),
        "vae": randomize(vae, 2),
        "text_encoder": tiny_qwen3_vl.build(encoder)[0],
    }


def write(
    folder: pathlib.Path,
    dtype: torch.dtype = torch.float32,
    *,
    max_shard_size: str = "5GB",
    scheduler: dict[str, Any] = SCHEDULER,
    index: dict[str, Any] | None = None,
    **options: Any,
) -> pathlib.Path:
    """Writes the pipeline folder; `index` adds entries to `model_index.json`, `options` are those of `build`."""
    for name, model in build(**options).items():
        copy.deepcopy(model).to(dtype).save_pretrained(folder / name, max_shard_size=max_shard_size)
    FlowMatchEulerDiscreteScheduler(**scheduler).save_pretrained(folder / "scheduler")
    save_qwen_processor(folder / "processor")
    # The published processor enlarges images below 256 x 256 pixels; tests compare smaller ones with diffusers.
    preprocessor = folder / "processor" / "preprocessor_config.json"
    values = json.loads(preprocessor.read_text())
    preprocessor.write_text(json.dumps(values | {"size": {"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096}}))
    (folder / "model_index.json").write_text(json.dumps(INDEX | (index or {}), indent=2))
    return folder
