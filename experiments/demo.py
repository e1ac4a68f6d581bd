"""The main job in miniature: a few images become a tiny model that reproduces them, exported to diffusers.

Command: `make demo`, which is `qi2 run experiments/demo.py --out runs/demo`; for a folder of your images with `.txt`
captions or a `metadata.jsonl`, `make demo DATA=path`.
Hardware: a CPU with 2 cores and 6 GiB, as a mesh of 8 fake devices.
Time: measured, see the README.

The autoencoder and the transformer are trained from scratch and far too small for anything but this. The condition
encoder is a tiny Qwen3-VL with random frozen weights and the real Qwen tokenizer, unless `encoder.folder` names the
folder of a real one.
"""

import dataclasses
from typing import Any

import ml_collections

from data_pipeline.selection.thresholds import Thresholds
from experiments import defaults


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The demo; the form `tiny` is the same job in seconds, for tests: it learns nothing.

    Raises:
      ValueError: for another form.
    """
    if form not in ("", "tiny"):
        raise ValueError(f"the demo has no form {form!r}, only 'tiny'")
    tiny = form == "tiny"
    config = ml_collections.ConfigDict()
    config.platform = "cpu"
    # Folder in which compiled programs are kept, absolute or below the job's folder; "": none, because a job that takes
    # minutes is seldom started again.
    config.compilation_cache = ""
    config.encode = dict(
        # What training computes in every step instead of reading it: "nothing", "text" or "text_and_images".
        online="nothing",
        dtype="float32",
        batch_size=8,  # images or prompts that are encoded at once
        mesh=dict(data=1, fsdp=1, tensor=1),
        records_per_unit=16_384,  # records that are encoded, stored, and after a kill encoded again as a whole
    )
    config.data = _data(tiny)
    config.encoder = dict(folder="", width=64, layers=2, heads=4, seed=7)
    config.vae = _autoencoder(tiny)
    config.transformer = _transformer(tiny)
    config.sample = dict(steps=4 if tiny else 20, seed=0, batch_size=64, captions=0)  # captions: the first ones; 0: all
    config.compare = dict(images=2, steps=4 if tiny else 20)
    # Metrics that the job must reach: a share of the generated images, and a difference of pixels, of 255.
    config.expect = dict(nearest_to_own=0.0 if tiny else 0.9, difference_to_pytorch=1)
    return config


def _data(tiny: bool) -> dict[str, Any]:
    return dict(
        sides=(64 if tiny else 96,),  # sides of the squares whose areas the buckets have, in pixels
        ratios=("1:1", "2:3", "3:2", "9:16", "16:9", "1:3", "3:1"),
        max_upscale=1.0,
        max_cropped=0.3,
        smaller_too=False,
        held_out=0.0,  # the demo must learn every image: only times and noise of validation differ from training
        mixture=dict(sides=(1,), tasks=(1, 0), conditions=(1,)),  # shares of the sides, of pairs and edits
        channels=4,
        workers=1,  # enough to keep two cores busy
        # A batch has as many text slots as the longest caption needs; longer captions are left out.
        thresholds=dict(dataclasses.asdict(Thresholds()), min_side=128, edits=False, min_tokens=1, max_tokens=128),
    )


def _autoencoder(tiny: bool) -> dict[str, Any]:
    return dict(
        seed=0,
        # One level on patches of 16 x 16 pixels instead of five on pixels: it can start as a linear code, and has no
        # convolutions at full resolution, which take most of the time on a CPU.
        model=dict(
            encoder_width=8 if tiny else 144,
            decoder_width=8 if tiny else 144,
            latent_channels=64,
            multipliers=(1,),
            residual_blocks=1,
            halves_time=(),
            patch_size=16,
        ),
        linear_start=0 if tiny else 32,  # batches; a model of the tiny form's width has no linear start
        mesh=dict(data=1, fsdp=1, tensor=1),  # small batches are faster on one device with all cores
        crop=32 if tiny else 64,
        # Only these images are ever encoded, always from their first pixel, and text is not mirrored.
        crop_step=16,
        mirrored=0.0,
        loss="squared",
        batch_size=8,
        ema_decay=0.95 if tiny else 0.99,
        ema_ramp=False,  # training is eight and more times as long as the EMA, which forgets the random weights
        train=defaults.train(2 if tiny else 450),
        validation=dict(every=10_000),
        samples=dict(every=0),
        profile=defaults.profile(),
        optimizer=dict(lr=4e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=1.0, warmup=50, decay_steps=450),
        checkpoint=defaults.checkpoint(1000 if tiny else 200),
        statistics_batches=2 if tiny else 16,  # batches from which the latents' mean and deviation are measured
    )


def _transformer(tiny: bool) -> dict[str, Any]:
    return dict(
        seed=1,
        model=dict(
            layers=2,
            heads=2 if tiny else 6,
            head_width=32,
            mlp_ratio=3,
            rope_dims=(8, 12, 12),
            eps=1e-6,
            attention="block_causal",
            condition_timestep="zero",
        ),
        mesh=dict(data=2, fsdp=2, tensor=2),
        execution=dict(dtype="float32", kernel="auto", remat=False, keep="inputs"),
        batch_sizes=(8 if tiny else 16,),  # for each side
        images_per_device=(0,),  # for each side, the largest microbatch of a device; 0: the whole batch
        batches_per_update=1,  # batches of data.mixture whose gradients are accumulated for an update
        dropout=0.1,
        text_slots=defaults.text_slots(),
        validation=dict(
            every=10_000,  # also before the first and after the last step
            samples=8 if tiny else 16,  # of each stream
        ),
        samples=defaults.samples(),
        ema_decay=0.5 if tiny else 0.99,
        ema_ramp=False,  # as above; the EMA of an adapter always ramps up
        timesteps=defaults.timesteps(),
        start=defaults.start(),
        lora=defaults.lora(),
        train=defaults.train(4 if tiny else 800, log_every=1 if tiny else 10),
        profile=defaults.profile(),
        optimizer=dict(lr=4e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.001, clip=1.0, warmup=20, decay_steps=800),
        checkpoint=defaults.checkpoint(1000 if tiny else 200),
    )
