"""A small autoencoder with the factor and the channels of the published one, for a CPU.

Command: `qi2 train experiments/autoencoder_small.py --data RECORDS --out RUN`, where RECORDS is a folder that `qi2 data
ingest --without-captions` made and `qi2 data score` scored. The same command continues after an interruption.
Hardware: a CPU with 2 cores.
Time: see docs/autoencoder.md.

It works on patches of 16 x 16 pixels and starts as the linear code of its training images. diffusers reads its export
as an `AutoencoderKLQwenImage21`.
"""

import ml_collections

from experiments import defaults
from experiments.qwen_image_2 import autoencoder

STEPS = 3_000


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The small autoencoder; the form `tiny` takes a few updates, for tests.

    Raises:
      ValueError: for another form.
    """
    if form not in ("", "tiny"):
        raise ValueError(f"the small autoencoder has no form {form!r}, only 'tiny'")
    tiny, steps = form == "tiny", 4 if form == "tiny" else STEPS
    config = autoencoder.get_config("tiny")
    side = 64 if tiny else 256
    config.data.sides = (side, 2 * side)
    config.data.thresholds.min_side = side
    config.data.held_out = 0.1
    config.data.mixture.sides = (1, 1)
    vae = autoencoder.autoencoder(tiny=True, crop=64 if tiny else 128)
    vae.update(
        mattes=0.0,
        mirrored=0.0,  # text is not mirrored
        # Two wide paths of 144 channels: a linear start needs more than twice the channels of latents.
        model=dict(
            encoder_width=144,
            decoder_width=144,
            latent_channels=64,
            multipliers=(1,),
            residual_blocks=1,
            halves_time=(),
            patch_size=16,
        ),
        linear_start=2 if tiny else 64,  # batches
        loss="squared",  # PSNR is the measure here; "absolute" with `perceptual` gives sharper images
        ema_decay=0.9 if tiny else 0.998,
        train=defaults.train(steps),
        validation=dict(every=2 if tiny else 250),
        optimizer=dict(
            lr=1e-4,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            clip=1.0,
            warmup=2 if tiny else 100,
            decay_steps=steps,
        ),
        checkpoint=defaults.checkpoint(2 if tiny else 500),
    )
    config.vae = vae
    return config
