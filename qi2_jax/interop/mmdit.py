"""Names and configuration of the published transformer (`QwenImage21Transformer2DModel`)."""

from collections.abc import Mapping
from typing import Any

from qi2_jax import sequence
from qi2_jax.interop.tensor_names import NameMap
from qi2_jax.models.mmdit import MMDiTConfig

CLASS = "QwenImage21Transformer2DModel"
ATTENTION = "qi2_attention"  # key of our model folders for an option that the published code does not have

NAMES = NameMap(
    renames=(
        ("transformer_blocks.{}.attn.to_q.", "blocks.attn.q."),
        ("transformer_blocks.{}.attn.to_k.", "blocks.attn.k."),
        ("transformer_blocks.{}.attn.to_v.", "blocks.attn.v."),
        ("transformer_blocks.{}.attn.to_out.0.", "blocks.attn.out."),
        ("transformer_blocks.{}.attn.norm_q.", "blocks.attn.q_norm."),
        ("transformer_blocks.{}.attn.norm_k.", "blocks.attn.k_norm."),
        ("transformer_blocks.{}.img_mlp.gate_layer.", "blocks.mlp.gate."),
        ("transformer_blocks.{}.img_mlp.proj.", "blocks.mlp.up."),
        ("transformer_blocks.{}.img_mlp.out.", "blocks.mlp.down."),
        ("time_text_embed.timestep_embedder.linear_1.", "time_in.up."),
        ("time_text_embed.timestep_embedder.linear_2.", "time_in.down."),
        ("txt_in.text_norm.", "text_in.norm."),
        ("txt_in.in_layer.", "text_in.up."),
        ("txt_in.out_layer.", "text_in.down."),
        ("img_in.", "image_in."),
        ("modulation.1.", "modulation."),
        ("norm_out.linear.", "final_modulation."),
        ("proj_out.", "image_out."),
    )
)


def from_diffusers(values: Mapping[str, Any]) -> MMDiTConfig:
    """Reads a transformer's `config.json`; missing keys take the published defaults.

    Raises:
      ValueError: for a patch size or output width that this model does not have.
    """
    default = MMDiTConfig()
    channels = values.get("in_channels", default.latent_channels)
    if values.get("patch_size", 1) != 1 or (values.get("out_channels") or channels) != channels:
        raise ValueError(
            f"only patch_size 1 with out_channels equal to in_channels is supported, got patch_size "
            f"{values.get('patch_size')}, in_channels {channels}, out_channels {values.get('out_channels')}"
        )
    return MMDiTConfig(
        layers=values.get("num_layers", default.layers),
        heads=values.get("num_attention_heads", default.heads),
        head_width=values.get("attention_head_dim", default.head_width),
        mlp_ratio=values.get("mlp_ratio", default.mlp_ratio),
        latent_channels=channels,
        text_width=values.get("context_in_dim", default.text_width),
        rope_dims=tuple(values.get("axes_dims_rope", default.rope_dims)),
        eps=values.get("eps", default.eps),
        attention=values.get(ATTENTION, sequence.BLOCK_CAUSAL),
        condition_timestep="zero" if values.get("causal_condition", True) else "sampled",
    )


def to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    """The `config.json` of a transformer; bidirectional attention, which diffusers cannot run, has a key of qi2."""
    extra = {} if config.attention == sequence.BLOCK_CAUSAL else {ATTENTION: config.attention}
    return extra | {
        "_class_name": CLASS,
        "patch_size": 1,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.layers,
        "attention_head_dim": config.head_width,
        "num_attention_heads": config.heads,
        "context_in_dim": config.text_width,
        "mlp_ratio": config.mlp_ratio,
        "axes_dims_rope": list(config.rope_dims),
        "eps": config.eps,
        "causal_condition": config.condition_timestep == "zero",
    }
