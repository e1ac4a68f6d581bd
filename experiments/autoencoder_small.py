"""A small autoencoder with the factor and the channels of the published one, for a CPU.

Command: `qi2 train experiments/autoencoder_small.py --data RECORDS --out RUN`, with the weights of LPIPS in
`weights/lpips` (docs/perceptual_weights.md). RECORDS is a folder that `qi2 data ingest --without-captions` made and
`qi2 data score` scored, from photographs and from images of text with `--name text`. The same command continues after
an interruption. In miniature, without weights and for all images: `experiments/autoencoder_small.py:tiny`.
Hardware: a CPU with 2 cores.
Time: see docs/autoencoder.md.

It works on patches of 16 x 16 pixels and starts as the linear code of its training images. diffusers reads its export
as an `AutoencoderKLQwenImage21`.
"""

import ml_collections

from experiments import defaults
from experiments.qwen_image_2 import autoencoder

STEPS, LPIPS_STEPS = 2_000, 1_300  # without and with LPIPS, on which a CPU spends most of an update
PERCEPTUAL_WEIGHT = 0.04  # of LPIPS, about 0.4, beside squared errors of about 0.02


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The small autoencoder; the form `tiny` takes a few updates, for tests.

    Raises:
      ValueError: for another form.
    """
    if form not in ("", "tiny"):
        raise ValueError(f"the small autoencoder has no form {form!r}, only 'tiny'")
    tiny = form == "tiny"
    first, steps = (2, 4) if tiny else (STEPS, STEPS + LPIPS_STEPS)
    config = autoencoder.get_config("tiny")
    side = 64 if tiny else 256
    config.data.sides = (side, 2 * side)
    config.data.thresholds.min_side = side
    config.data.held_out = 0.1
    config.data.mixture.sides = (1, 1)
    crop = 64 if tiny else 128
    vae = autoencoder.autoencoder(tiny=True, crop=crop)
    kinds = {} if tiny else dict(photographs=(), text=("source/text",))
    shares = {kind: 1 for kind in kinds}
    vae.update(
        channels=3,
        mattes=0.0,
        mirrored=0.0,  # text is not mirrored
        # A linear start needs more than twice the channels of latents. The others learn what is not linear.
        model=dict(
            encoder_width=144,
            decoder_width=192,
            latent_channels=64,
            multipliers=(1,),
            residual_blocks=1,
            halves_time=(),
            patch_size=16,
            in_channels=3,
            out_channels=3,
        ),
        linear_start=2 if tiny else 128,  # batches
        loss="squared",
        perceptual=dict(weight=0.0 if tiny else PERCEPTUAL_WEIGHT, folder="weights/lpips", start=0 if tiny else first),
        kinds=kinds,
        shares=shares,
        batch_size=4 if tiny else 16,
        later_phases=dict(perceptual=dict(start=first, crop=crop, batch_size=2 if tiny else 8, shares=shares)),
        ema_decay=0.9 if tiny else 0.998,
        train=defaults.train(steps),
        validation=dict(every=2 if tiny else 100, images=16),
        optimizer=dict(
            lr=4e-4,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            clip=1.0,
            warmup=2 if tiny else 50,
            decay_steps=steps,
        ),
        checkpoint=defaults.checkpoint(2 if tiny else 300),
    )
    config.vae = vae
    return config
