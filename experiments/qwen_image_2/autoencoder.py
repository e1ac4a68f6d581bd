"""The autoencoder f16c64 with the loss of Qwen-Image-VAE-2.0: L1, LPIPS, and alignment with DINOv2.

Command: `qi2 train experiments/qwen_image_2/autoencoder.py --data RECORDS --out RUN`, with the weights of LPIPS in
`weights/lpips` and of DINOv2-L in `weights/dinov2-large` (docs/perceptual_weights.md). The same command continues after
an interruption. RECORDS is a folder that `qi2 data ingest` made and `qi2 data score` scored. It has photographs, pages
and other images of text, and synthetic text over photographs (docs/autoencoder.md says how to join them).
In miniature, without these weights: `qi2 train experiments/qwen_image_2/autoencoder.py:tiny --data RECORDS --out RUN`.
Hardware: four slices of 256 v6e chips; the tiny form a CPU with 2 cores.
Time: not measured on these chips; the tiny form takes about a minute.

Where the values come from:
- Reports of Qwen-Image-2.0 and Qwen-Image-VAE-2.0: sizes, terms of the loss without KL and adversary, alignment with
  one middle layer of DINOv2-L, which is strong first and relaxed later, and the order of resolutions and kinds of
  images. They give no weights, margins, rates or steps, and do not name the layer.
- VA-VAE (arXiv 2501.01423, released code and configs): the weight of LPIPS, both margins, and the weights of the
  alignment, 0.5 while it is strict and 0.1 later. VA-VAE itself aligns with the last layer of DINOv2-L after the final
  norm (`alignment.layer=0`), and has a KL and an adversarial term.
- Ours, and marked so below: the number of the layer, when and how gradually the alignment is relaxed, optimizer and
  learning rates, steps, batches, crops, shares of the kinds, and mattes.
"""

import dataclasses
from typing import Any

import ml_collections

from data_pipeline.buckets import RATIOS
from data_pipeline.selection.thresholds import Thresholds
from experiments import defaults
from experiments.qwen_image_2 import base

STEPS, TINY_STEPS = 200_000, 60
# Four slices of 256 chips. Two chips share the rows of a crop, because one has no room for 2048 x 2048 pixels.
MESH = dict(data=4, fsdp=128, tensor=2)


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The autoencoder; the form `tiny` trains a small one on small crops, without frozen networks.

    Raises:
      ValueError: for another form.
    """
    if form not in ("", "tiny"):
        raise ValueError(f"the autoencoder has no form {form!r}, only 'tiny'")
    tiny = form == "tiny"
    config = ml_collections.ConfigDict()
    config.platform = "cpu" if tiny else ""
    config.compilation_cache = "" if tiny else "compiled"  # as in `base.stage`
    config.data = _data(tiny)
    config.vae = autoencoder(tiny, crop=32 if tiny else 256) | _phases(tiny)
    return config


def _data(tiny: bool) -> dict[str, Any]:
    """Images of all kinds. Their records must be scored; captions are not needed."""
    return dict(
        # Each image is read at the largest of these resolutions that it fills. The narrowest bucket of the smallest one
        # has room for a crop; images without would not be used.
        sides=(64,) if tiny else (512, 1024, 2048),
        ratios=RATIOS,
        max_upscale=1.0,
        max_cropped=0.25,
        smaller_too=False,
        held_out=0.25 if tiny else 0.0001,  # as in the stages, so that no stage trains on what another one holds out
        mixture=dict(sides=(1,) if tiny else (1, 1, 1), tasks=(1, 0), conditions=(1,)),  # unused by the autoencoder
        thresholds=dict(
            dataclasses.asdict(Thresholds()),
            min_side=64 if tiny else 512,
            max_aspect=3.0,  # the buckets end at 1:3 and 3:1
            edits=False,
            min_tokens=0,
            max_tokens=1_000_000,
        ),
    )


def autoencoder(tiny: bool, crop: int) -> dict[str, Any]:
    """The model, its loss and its training, also for the first step of the curriculum.

    Args:
      tiny: whether to train a small model without frozen networks.
      crop: side of the crops in pixels.
    """
    steps = TINY_STEPS if tiny else STEPS
    return dict(
        seed=0,
        channels=4,
        mattes=0.1,  # ours: share of crops that a random matte makes partly transparent; nearly all images are opaque
        model=dict(
            encoder_width=8 if tiny else 96,
            decoder_width=8 if tiny else 144,
            latent_channels=64,
            multipliers=(1, 2, 4, 4, 4) if tiny else (1, 2, 4, 8, 8),
            residual_blocks=1 if tiny else 2,
            halves_time=(False, True, True, True),
        ),
        mesh=dict(data=2, fsdp=1, tensor=1) if tiny else MESH,
        crop=crop,
        loss="absolute",
        perceptual=dict(
            weight=0.0 if tiny else 1.0,
            folder="weights/lpips",  # absolute, or relative to the folder in which the command runs
            start=0,  # updates without this term before the others
        ),
        alignment=_alignment(tiny, steps),
        kl=0.0,  # the report removed it, because it works against the alignment
        batch_size=8 if tiny else 4_096,
        execution=dict(
            dtype="float32" if tiny else "bfloat16",  # of activations; parameters and terms of the loss are fp32
            # Levels, highest resolution first, whose blocks the backward pass recomputes, for crops of at least
            # remat_from x remat_from pixels (docs/autoencoder.md says what these keep).
            remat_levels=0 if tiny else 5,
            remat_from=0 if tiny else 512,
        ),
        ema_decay=0.9 if tiny else 0.9999,
        ema_ramp=True,
        train=defaults.train(steps) if tiny else defaults.train(steps, watchdog_seconds=base.WATCHDOG_SECONDS),
        validation=dict(every=1_000_000 if tiny else 1_000, images=16 if tiny else 256),
        samples=dict(every=0 if tiny else 5_000),
        profile=defaults.profile(),
        optimizer=_optimizer(tiny, steps),
        checkpoint=defaults.checkpoint(20 if tiny else 1_000),
        # Mean and deviation of the latents are measured over this number of images (0: all), or of batches of crops.
        statistics_batches=0,
        statistics_images=0,
    )


def _alignment(tiny: bool, steps: int) -> dict[str, Any]:
    return dict(
        # Gradient at the encoder's last layer, relative to the reconstruction's: VA-VAE's at first.
        weight=0.0 if tiny else 0.5,
        relaxed_weight=0.0 if tiny else 0.1,  # VA-VAE's, later; 0: the same as before
        folder="weights/dinov2-large",
        network="dinov2",  # or "vgg16", from a folder of LPIPS
        layer=12,  # ours: the report says only that a middle layer is best; 0: the last one after the final norm
        cosine_margin=0.5,  # VA-VAE's, as the next one
        distance_margin=0.25,
        # Ours: VA-VAE lowers the weight after 100 of 130 epochs, and widens the margins after 115, both at once.
        strict_steps=int(0.8 * steps),
        relaxing_steps=int(0.1 * steps),
    )


def _optimizer(tiny: bool, steps: int) -> dict[str, Any]:
    return dict(
        # Ours: Muon trains matrices with `lr`, and Adam biases and norms with `adam_lr`. With kind="adam", Adam
        # trains everything with `lr`, and adam_lr must be 0.
        kind="muon",
        lr=0.02,
        momentum=0.95,
        adam_lr=1e-3 if tiny else 1e-4,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        warmup=10 if tiny else 1_000,
        decay_steps=steps,
    )


def _phases(tiny: bool) -> dict[str, Any]:
    """From low to high resolution, with more text later; `crop` and `batch_size` are those of the first phase.

    Steps, sizes and shares are ours; the report has only the order.
    """
    if tiny:
        shares = dict(photographs=1, synthetic=1)
        at_48 = dict(start=TINY_STEPS * 2 // 3, crop=48, batch_size=8, ratios=("1:1", "3:1", "1:3"), shares=shares)
        return dict(
            ratios=("1:1",),
            kinds=dict(photographs=(), synthetic=("synthetic/",)),
            unmirrored_kinds=("synthetic",),
            shares=dict(photographs=3, synthetic=1),
            later_phases=dict(at_48=at_48),
        )

    def later(start: int, crop: int, batch_size: int) -> dict[str, Any]:
        shares = dict(photographs=5, text=3, synthetic=2)
        return dict(start=start, crop=crop, batch_size=batch_size, ratios=RATIOS, shares=shares)

    return dict(
        ratios=("1:1",),
        # The labels of each kind: tags of the records, or `source/` and the name of their data set.
        kinds=dict(photographs=(), text=("design/", "text/", "source/pages"), synthetic=("synthetic/",)),
        unmirrored_kinds=("text", "synthetic"),  # the boxes of lines, which also prevent it, may be unknown
        shares=dict(photographs=8, text=1, synthetic=1),
        later_phases=dict(
            at_512=later(start=120_000, crop=512, batch_size=2_048),
            at_1024=later(start=160_000, crop=1024, batch_size=1_024),
            at_2048=later(start=190_000, crop=2048, batch_size=512),
        ),
    )
