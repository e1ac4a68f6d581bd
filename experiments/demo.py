"""The main job in miniature: a few pictures become a tiny model that reproduces them, exported to diffusers.

Command: `make demo`, which is `qi2 run experiments/demo.py --out runs/demo`; with your own folder of images beside
`.txt` captions, or with a `metadata.jsonl`, `make demo DATA=path`.
Hardware: a CPU with 2 cores and 6 GiB, as a mesh of 8 fake devices.
Time: see the README, measured.

The autoencoder and the transformer are trained from scratch and far too small for anything but this. The condition
encoder is a tiny Qwen3-VL with random frozen weights and the real Qwen tokenizer, unless `encoder.folder` names a
folder of the real one.
"""

import dataclasses

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
    # Where programs are kept that were compiled once, a path below the folder of the job or run, or a whole one; empty:
    # nowhere, since a job that takes minutes is seldom started again.
    config.compilation_cache = ""
    config.encode = dict(
        # What training computes in every step instead of reading it: "nothing", "text" or "text_and_images".
        online="nothing",
        dtype="float32",
        batch_size=8,  # images or prompts at once
        mesh=dict(data=1, fsdp=1, tensor=1),
        records_per_unit=16_384,  # what is encoded, stored, and done again after a kill, as a whole
    )
    config.data = dict(
        sides=(64 if tiny else 96,),  # of the squares whose area the buckets have, in pixels
        ratios=("1:1", "2:3", "3:2", "9:16", "16:9", "1:3", "3:1"),
        max_upscale=1.0,
        max_cropped=0.3,
        smaller_too=False,
        held_out=0.0,  # the job must learn every picture: validation holds only times and noise
        mixture=dict(sides=(1,), tasks=(1, 0), conditions=(1,)),  # steps of each side, of pairs and edits
        channels=4,
        workers=1,  # two cores are busy enough with one
        # A batch has as many text slots as the longest caption needs; longer captions are left out.
        thresholds=dict(dataclasses.asdict(Thresholds()), min_side=128, edits=False, min_tokens=1, max_tokens=128),
    )
    config.encoder = dict(folder="", width=64, layers=2, heads=4, seed=7)
    config.vae = dict(
        seed=0,
        model=dict(
            encoder_width=8 if tiny else 16,
            decoder_width=8 if tiny else 16,
            latent_channels=64,
            multipliers=(1, 2, 4, 4, 4),
            residual_blocks=1,
            halves_time=(False, True, True, True),
        ),
        mesh=dict(data=2, fsdp=1, tensor=1),  # convolutions of one or two images a device are slow on a CPU
        crop=32,
        loss="squared",
        batch_size=8 if tiny else 16,
        ema_decay=0.95 if tiny else 0.99,
        ema_ramp=False,  # eight and more times the length of the average is trained: the random start is forgotten
        train=defaults.train(2 if tiny else 1000),
        validation=dict(every=10_000),
        samples=dict(every=0),
        profile=defaults.profile(),
        optimizer=dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=1.0, warmup=20, decay_steps=1000),
        checkpoint=defaults.checkpoint(1000 if tiny else 200),
        statistics_batches=2 if tiny else 16,  # crops from which the latents' mean and deviation are taken
    )
    config.transformer = dict(
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
        execution=dict(dtype="float32", kernel="auto", remat=False),
        batch_sizes=(8 if tiny else 16,),  # of each side
        images_per_device=(0,),  # of each side, at once; a larger batch is read in parts. 0: the whole batch
        batches_per_update=1,  # turns of data.mixture whose images one update of the parameters reads
        dropout=0.1,
        validation=dict(
            every=10_000,  # before the first and after the last step in any case
            samples=8 if tiny else 16,  # of each area and task
        ),
        samples=defaults.samples(),
        ema_decay=0.5 if tiny else 0.99,
        ema_ramp=False,  # as above; an adapter's average always ramps up
        timesteps=defaults.timesteps(),
        start=defaults.start(),
        lora=defaults.lora(),
        train=defaults.train(4 if tiny else 800, log_every=1 if tiny else 10),
        profile=defaults.profile(),
        optimizer=dict(lr=4e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.001, clip=1.0, warmup=20, decay_steps=800),
        checkpoint=defaults.checkpoint(1000 if tiny else 200),
    )
    config.sample = dict(steps=4 if tiny else 20, seed=0, batch_size=64, captions=0)  # the first ones; 0: all
    config.compare = dict(images=2, steps=4 if tiny else 20)
    # What a job must reach to succeed: share of samples, and levels of 255.
    config.expect = dict(nearest_to_own=0.0 if tiny else 0.9, difference_to_pytorch=1)
    return config
