"""Exchange of the image autoencoder with diffusers (`AutoencoderKLQwenImage21`): its configuration and tensor names."""

from collections.abc import Mapping
from typing import Any

from qi2_jax.interop.tensor_names import NameMap
from qi2_jax.models.vae import VAEConfig

CLASS_NAME = "AutoencoderKLQwenImage21"

MAX_BLOCKS, MAX_LEVELS = 64, 8  # limits for configurations from outside

# Published options that change the model, each with the only value that is supported.
_FIXED = {"is_residual": True, "attn_scales": [], "dropout": 0.0}

_FIELDS = {
    "encoder_width": "base_dim",
    "decoder_width": "decoder_base_dim",
    "latent_channels": "z_dim",
    "multipliers": "dim_mult",
    "residual_blocks": "num_res_blocks",
    "halves_time": "temperal_downsample",  # published with this spelling
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}


def from_diffusers(published: Mapping[str, Any]) -> VAEConfig:
    """Reads the content of a published `config.json`; missing sizes take the published defaults.

    Raises:
      ValueError: for another class, for missing statistics of the latents, for unknown entries, and for values that
        our autoencoder does not support.
    """
    if (found := published.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise ValueError(f"the autoencoder's class is {found!r}; only {CLASS_NAME} is supported")
    entries = {key: value for key, value in published.items() if not key.startswith("_")}
    if missing := sorted({"latents_mean", "latents_std"} - entries.keys()):
        raise ValueError(f"the autoencoder's configuration lacks {missing}; add one value per latent channel")
    if unknown := sorted(entries.keys() - {*_FIELDS.values(), "patch_size", *_FIXED, *_scale_factors(VAEConfig())}):
        raise ValueError(
            f"the autoencoder's configuration has unknown entries {unknown}; only those of diffusers 0.42 are supported"
        )
    for key, value in _FIXED.items():
        if entries.get(key, value) != value:
            raise ValueError(f"the autoencoder has {key} = {entries[key]!r}; only {value!r} is supported")
    if entries.get("decoder_base_dim", 0) is None:
        entries["decoder_base_dim"] = entries.get("base_dim", VAEConfig().encoder_width)
    values: dict[str, Any] = {field: entries[key] for field, key in _FIELDS.items() if key in entries}
    fields: dict[str, Any] = {field: tuple(v) if isinstance(v, list) else v for field, v in values.items()}
    if fields.get("residual_blocks", 1) > MAX_BLOCKS or len(fields.get("multipliers", ())) > MAX_LEVELS:
        raise ValueError(
            f"the autoencoder has num_res_blocks = {fields.get('residual_blocks')} and "
            f"{len(fields.get('multipliers', ()))} levels in dim_mult; at most {MAX_BLOCKS} and {MAX_LEVELS} are read"
        )
    # Published channels are those of the patches.
    if (patch := entries.get("patch_size")) is not None:
        fields["patch_size"] = patch
        for name in ("in_channels", "out_channels"):
            channels = fields.get(name, 0)
            if not isinstance(patch, int) or patch < 1 or channels % patch**2:
                raise ValueError(
                    f"the autoencoder has {name} = {channels} and patch_size = {patch}; the first must be 3 or 4 times "
                    "the square of the second"
                )
            fields[name] = channels // patch**2
    config = VAEConfig(**fields)
    for key, value in _scale_factors(config).items():
        if entries.get(key, value) not in (None, value):
            raise ValueError(f"the autoencoder has {key} = {entries[key]!r}, but its levels make it {value}")
    return config


def to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """The content of a published `config.json`, ready for JSON."""
    entries = {key: getattr(config, field) for field, key in _FIELDS.items()}
    if config.latents_mean is None:
        entries["latents_mean"] = (0.0,) * config.latent_channels
    if config.latents_std is None:
        entries["latents_std"] = (1.0,) * config.latent_channels
    for key in ("in_channels", "out_channels"):
        entries[key] *= config.patch_size**2
    entries["patch_size"] = None if config.patch_size == 1 else config.patch_size
    entries = {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}
    return {"_class_name": CLASS_NAME, **entries, **_FIXED, **_scale_factors(config)}


def name_map(config: VAEConfig) -> NameMap:
    """The name map of the published autoencoder.

    The published layers that change resolution have their convolution as the second of a sequence, next to a
    convolution over time, which images do not pass through.
    """
    renames = []
    for level in range(len(config.halves_time)):
        for ours in (f"encoder.down_blocks.{level}.downsampler.", f"decoder.up_blocks.{level}.upsampler."):
            renames.append((ours + "resample.1.", ours))
    passthrough = (r".*\.(down|up)sampler\.time_conv\.(weight|bias)",)
    return NameMap(renames=tuple(renames), passthrough=passthrough, passthrough_shapes=passthrough_shapes(config))


def passthrough_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of the convolutions over time, the passthrough tensors of the autoencoder.

    Their values mean nothing for images: weights that were trained from scratch are published with zeros here.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for index, level in enumerate(config.encoder_levels()):
        if level.frames == 2:
            name, dim = f"encoder.down_blocks.{index}.downsampler.time_conv", level.out_dim
            shapes |= {f"{name}.weight": (dim, dim, 1, 1), f"{name}.bias": (dim,)}
    for index, level in enumerate(config.decoder_levels()):
        if level.frames == 2:
            name, dim = f"decoder.up_blocks.{index}.upsampler.time_conv", level.out_dim
            shapes |= {f"{name}.weight": (2 * dim, dim, 1, 1), f"{name}.bias": (2 * dim,)}
    return shapes


def _scale_factors(config: VAEConfig) -> dict[str, int]:
    return {"scale_factor_temporal": 2 ** sum(config.halves_time), "scale_factor_spatial": config.factor}
