"""Tiny random Qwen3-VL models of transformers, and the same weights in ours."""

import functools
import itertools

import jax
import numpy as np
import torch
from transformers import Qwen3VLConfig as PublishedConfig
from transformers import Qwen3VLForConditionalGeneration

from qi2_jax.interop import tensor_names
from qi2_jax.interop.qwen3_vl import NAMES
from qi2_jax.models import tree
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.models.qwen3_vl.model import Qwen3VL

IMAGE, VIDEO, VISION_START, VISION_END = 60, 61, 62, 63  # ids in a vocabulary of 64 tokens

# All sizes differ, so that no two of them can be confused.
SHAPES = {
    "grouped_queries": (
        dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2)
        | dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=5e5, mrope_section=[4, 2, 2])),
        dict(hidden_size=32, intermediate_size=20, depth=3, num_heads=2, deepstack_visual_indexes=[0, 2])
        | dict(patch_size=4, num_position_embeddings=36),
    ),
    "single_key_head": (
        dict(hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1)
        | dict(head_dim=12, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 1]))
        | dict(rms_norm_eps=1e-5),
        dict(hidden_size=24, intermediate_size=36, depth=5, num_heads=3, deepstack_visual_indexes=[1, 2, 3])
        | dict(patch_size=2, temporal_patch_size=1, num_position_embeddings=25, spatial_merge_size=3),
    ),
    "patches_of_qwen": (
        dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
        | dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[2, 1, 1])),
        dict(hidden_size=8, intermediate_size=16, depth=2, num_heads=2, deepstack_visual_indexes=[0, 1])
        | dict(patch_size=16, num_position_embeddings=81),
    ),
    "as_many_key_heads": (
        dict(hidden_size=28, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
        | dict(head_dim=10, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[24, 20, 20])),
        dict(hidden_size=12, intermediate_size=8, depth=2, num_heads=1, deepstack_visual_indexes=[1])
        | dict(patch_size=3, num_position_embeddings=4),
    ),
}


TINY_TOKENS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)


def published_config(shape: str, *, vocabulary: int = 64, **fields) -> PublishedConfig:
    """Configuration of a tiny model; with Qwen's vocabulary of 151936 it has Qwen's special token ids as well."""
    text, vision = SHAPES[shape]
    config = PublishedConfig(
        text_config=dict(text, vocab_size=vocabulary),
        vision_config=dict(vision, out_hidden_size=text["hidden_size"]),
        **(TINY_TOKENS if vocabulary == 64 else {}),
        **fields,
    )
    config._attn_implementation = "eager"
    return config


def build(config: PublishedConfig) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VL, Qwen3VLConfig]:
    """A published model in fp32 with random weights, biases and norms, and our model with the same parameters."""
    theirs = Qwen3VLForConditionalGeneration(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
        else:
            is_table = "embed_tokens" in name or "pos_embed" in name
            parameter.copy_(noise if is_table else noise * parameter[0].numel() ** -0.5)
    ours_config = Qwen3VLConfig.from_dict(config.to_dict())
    return theirs, ours_of(theirs, ours_config), ours_config


def ours_of(theirs: Qwen3VLForConditionalGeneration, config: Qwen3VLConfig) -> Qwen3VL:
    """Our model with the weights of a published one."""
    like = jax.eval_shape(functools.partial(Qwen3VL, config), key=jax.random.key(0))
    published = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    return tree.from_dict(like, tensor_names.stack(published, tree.to_dict(like), NAMES))


def hidden_state(theirs: Qwen3VLForConditionalGeneration, **inputs) -> np.ndarray:
    """Output of the last decoder layer before the final norm, fp32 [B, S, D]."""
    kept = []
    norm = theirs.model.language_model.norm
    handle = norm.register_forward_hook(lambda module, args, output: kept.append(args[0]))
    theirs(**inputs)
    handle.remove()
    return kept[0].numpy()


def random_images(config: Qwen3VLConfig, sizes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches and grids (in patches) of images whose sizes are given in features."""
    merge = config.vision.spatial_merge_size
    grids = np.array([(1, rows * merge, columns * merge) for rows, columns in sizes], np.int64).reshape(-1, 3)
    count = int(np.prod(grids, axis=1).sum())
    return np.random.default_rng(seed).normal(size=(count, config.vision.patch_dim)).astype(np.float32), grids


def random_prompt(sizes, lengths, seed: int) -> list[int]:
    """Token ids of text runs of the given lengths around images of the given sizes in features."""
    rng = np.random.default_rng(seed)
    runs = [rng.integers(0, IMAGE, length).tolist() for length in lengths]
    images = [[VISION_START] + [IMAGE] * (rows * columns) + [VISION_END] for rows, columns in sizes]
    parts = itertools.chain.from_iterable(itertools.zip_longest(runs, images, fillvalue=[]))
    return list(itertools.chain.from_iterable(parts))
