"""The whole curriculum: data selection and caches, then six stages, each from the last one's parameters and EMA.

Command: `qi2 run experiments/qwen_image_2/curriculum.py --data RECORDS --out DIR model.folder=ENCODERS`; started again
it goes on where it was cut. RECORDS is a folder that `qi2 data ingest` made and `qi2 data score` scored, with a CLIP
and an aesthetic head; ENCODERS an imported folder, whose Qwen3-VL and autoencoder are used.
What is drawn of edits while training needs pictures of scikit-image: `pip install 'qi2[demo]'`.
In miniature, on pictures that are made on the way: `qi2 run experiments/qwen_image_2/curriculum.py:tiny --out DIR`.
Hardware: four slices of 256 v6e chips; the tiny form a CPU with 2 cores, as a mesh of 8 fake devices.
Time: the sum of the stages', see each of them; the tiny form under 15 minutes.
"""

import ml_collections

from experiments import defaults
from experiments.qwen_image_2 import (
    base,
    s1_256p_t2i,
    s2_256p_edits,
    s3_512p_synthetic,
    s4_1024p,
    s5_2048p,
    s6_fine_tuning,
)

STAGES = (s1_256p_t2i, s2_256p_edits, s3_512p_synthetic, s4_1024p, s5_2048p, s6_fine_tuning)


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The curriculum; the form `tiny` makes its own data and learns little.

    Raises:
      ValueError: for another form.
    """
    tiny = form == "tiny"
    config = ml_collections.ConfigDict()
    config.platform = "cpu" if tiny else ""
    # Programs that were compiled once are read from here when a run is started again; a path below the curriculum's
    # folder, or a whole one such as gs://BUCKET/compiled. Empty: none are kept.
    config.compilation_cache = "compiled"
    # Where --data names no records: pictures of scikit-image, and so many edits and text-rich pictures made of them.
    config.corpus = dict(edits=90 if tiny else 0, texts=24 if tiny else 0, side=512, workers=2 if tiny else 0)
    # Whose condition encoder and autoencoder are used; empty: those of the next two groups.
    config.model = dict(folder="")
    config.encoder = dict(folder="", width=64, layers=2, heads=4, seed=7)  # as in experiments/demo.py
    config.vae = dict(
        seed=0,
        channels=4,
        model=dict(
            encoder_width=8 if tiny else 96,
            decoder_width=8 if tiny else 144,
            latent_channels=64,
            multipliers=(1, 2, 4, 4, 4) if tiny else (1, 2, 4, 8, 8),
            residual_blocks=1 if tiny else 2,
            halves_time=(False, True, True, True),
        ),
        mesh=dict(data=2, fsdp=1, tensor=1) if tiny else dict(data=4, fsdp=256, tensor=1),
        crop=32 if tiny else 256,
        loss="squared" if tiny else "absolute",
        batch_size=16 if tiny else 4_096,
        ema_decay=0.99 if tiny else 0.9999,
        ema_ramp=True,  # it begins with random parameters, and an end that is brought forward must not show them
        train=defaults.train(150) if tiny else defaults.train(200_000, watchdog_seconds=base.WATCHDOG_SECONDS),
        validation=dict(every=1_000_000),
        samples=dict(every=0),
        profile=defaults.profile(),
        optimizer=dict(
            lr=2e-3 if tiny else 1e-4,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0.0,
            clip=1.0,
            warmup=20 if tiny else 1_000,
            decay_steps=150 if tiny else 200_000,
        ),
        checkpoint=defaults.checkpoint(50 if tiny else 1_000),
        statistics_batches=8 if tiny else 64,  # crops from which the latents' mean and deviation are taken
    )
    # The run, checkpoint or imported folder with whose transformer the first stage begins; empty: random weights.
    config.start = dict(folder="")
    # Read as the order of the stages, which the keys of a config do not keep.
    config.order = tuple(stage.__name__.rpartition(".")[2] for stage in STAGES)
    config.stages = {stage.__name__.rpartition(".")[2]: stage.get_config(form) for stage in STAGES}
    return config
