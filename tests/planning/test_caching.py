"""The encoders of a caching job, compiled for TPU chips that are not attached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.attention.splash import OVERHEADS, block_sizes, computed_pairs
from qi2_jax.interop.components import COMPONENTS
from qi2_jax.models.qwen3_vl.config import Qwen3VLConfig
from qi2_jax.models.qwen3_vl.inputs import prepare_inputs
from qi2_jax.models.vae import VAEConfig
from qi2_jax.planning.caching import QWEN3_VL_8B, CachingJob
from qi2_jax.planning.compile import host_mesh
from qi2_jax.planning.operations import operations
from qi2_jax.sharding import MeshShape
from tests.models.tiny_qwen3_vl import published_config
from tests.tpu import needs_libtpu

TINY = Qwen3VLConfig.from_dict(published_config("patches_of_qwen").to_dict())
TINY_VAE = VAEConfig(4, 4, 8, multipliers=(1, 1), halves_time=(True,))


def job(**options):
    mesh = host_mesh("v5e:4x4", MeshShape(data=4))
    return CachingJob(mesh, jnp.dtype("bfloat16"), 8, vae=TINY_VAE, **{"text_encoder": TINY, **options})


@needs_libtpu
def test_operations_of_prompts_with_images():
    """Attention is causal in the text tower only; all else is counted from the model, without attention."""
    plan = job().plan_prompts(1202, images=3, patches=24)
    assert plan.name == "prompts, 1216 tokens, 3 images" and plan.images == 8
    prompts, images = 2, 6  # of a chip
    inputs = prepare_inputs(TINY, [[0]] * prompts, length=1216, image_count=images, patch_count=24)
    model = job().weights["text_encoder"]
    others = operations(lambda model, inputs: model(inputs, kernel=lambda q, k, v, *_: q), model, inputs)

    text, vision, until = TINY.text, TINY.vision, np.arange(1216) + 1
    queries, keys, _ = block_sizes(until, 1024, OVERHEADS["TPU v5 lite"])
    pairs = computed_pairs(until, queries, keys)
    attention = 4 * pairs * text.head_dim * text.num_attention_heads * text.num_hidden_layers * prompts
    attention += 4 * 128**2 * vision.head_dim * vision.num_heads * vision.depth * images  # 24 patches are one block
    assert plan.analysis.flops == pytest.approx(others + attention, rel=1e-4)


@needs_libtpu
def test_weights_of_both_encoders_must_fit():
    large = dataclasses.replace(QWEN3_VL_8B, text=dataclasses.replace(QWEN3_VL_8B.text, num_hidden_layers=48))
    message = r"the encoding of 8 images, 32 x 32, needs 19.\d+ GiB of a chip with 15.75 GiB.*lower encode.batch_size"
    with pytest.raises(ValueError, match=message):
        job(text_encoder=large).plan_images(32, 32)


def test_the_published_encoder_has_the_published_number_of_parameters():
    """8.77B, with the final norm and the language head, which the condition encoder lacks."""
    ours, text = COMPONENTS["text_encoder"].abstract(QWEN3_VL_8B), QWEN3_VL_8B.text
    count = sum(leaf.size for leaf in jax.tree.leaves(ours)) + text.hidden_size * (1 + text.vocab_size)
    assert round(count / 1e9, 2) == 8.77
