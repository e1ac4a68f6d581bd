"""Parity of CLIP and SigLIP with transformers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from qi2_jax.interop.clip import NAMES
from qi2_jax.interop.tensor_names import stack
from qi2_jax.models import tree
from qi2_jax.models.clip import DualEncoder, DualEncoderConfig

VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 5, "vocab_size": 90}
CASES = {
    "clip": (CLIPModel, CLIPConfig, {"eos_token_id": 88}, {"patch_size": 8, "image_size": 32}, {"projection_dim": 28}),
    "clip_legacy_eos": (CLIPModel, CLIPConfig, {"eos_token_id": 2}, {"patch_size": 8, "hidden_act": "gelu"}, {}),
    "siglip": (SiglipModel, SiglipConfig, {"projection_size": 24}, {"patch_size": 4, "image_size": 20}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_embeddings_parity(case):
    model_class, config_class, text, vision, more = CASES[case]
    torch.manual_seed(0)
    vision, text = VISION | {"image_size": 16} | vision, TEXT | {"max_position_embeddings": 11} | text
    published = config_class(text_config=text, vision_config=vision, **more)
    theirs = model_class(published).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = DualEncoderConfig.from_dict(published.to_dict())
    like = jax.eval_shape(lambda key: DualEncoder(config, key=key), jax.random.key(0))
    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = tree.from_dict(like, {k: jnp.asarray(v) for k, v in stack(arrays, tree.to_dict(like), NAMES).items()})

    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(3, config.image_size, config.image_size, 3)).astype(np.float32)
    ids = rng.integers(3, 88, (4, 11))
    ids[np.arange(4), [10, 3, 5, 7]] = 88  # end token, followed by padding
    with torch.no_grad():
        images = theirs.get_image_features(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        texts = theirs.get_text_features(input_ids=torch.from_numpy(ids))
    for mine, other in (
        (jax.jit(lambda m, x: m.embed_images(x))(ours, pixels), images.pooler_output),
        (jax.jit(lambda m, x: m.embed_texts(x))(ours, ids), texts.pooler_output),
    ):
        expected = torch.nn.functional.normalize(other, dim=-1).numpy()
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model_type 'blip' is not supported"):
        DualEncoderConfig.from_dict({"model_type": "blip"})
    with pytest.raises(ValueError, match="activation 'swish' is unknown"):
        DualEncoderConfig.from_dict({"model_type": "clip", "text_config": {"hidden_act": "swish"}})
