"""The whole curriculum: data selection, samples, and six stages.

Each stage starts from the weights and the EMA of the stage before it.

Command: `qi2 run experiments/qwen_image_2/curriculum.py --data RECORDS --out DIR model.folder=ENCODERS`; the same
command continues after an interruption. RECORDS is a folder that `qi2 data ingest` made and `qi2 data score` scored,
with a CLIP and an aesthetic head. ENCODERS is an imported folder, whose Qwen3-VL and autoencoder are used.
The fixed edits that are drawn during training need images of scikit-image: `pip install 'qi2[demo]'`.
In miniature, with images that it makes itself: `qi2 run experiments/qwen_image_2/curriculum.py:tiny --out DIR`.
Hardware: four slices of 256 v6e chips; the tiny form a CPU with 2 cores, as a mesh of 8 fake devices.
Time: the sum over the stages, see each of them; the tiny form under 15 minutes.
"""

from typing import Any

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
    # Folder in which compiled programs are kept, so that a restart does not compile them again: a path below the
    # curriculum's folder, or an absolute one such as gs://BUCKET/compiled; "": none.
    config.compilation_cache = "compiled"
    # Without --data: images of scikit-image, and numbers of edits and text-rich images that are made from them.
    config.corpus = dict(edits=90 if tiny else 0, texts=24 if tiny else 0, side=512, workers=2 if tiny else 0)
    # Model folder whose condition encoder and autoencoder are used; "": those of the next two groups.
    config.model = dict(folder="")
    config.encoder = dict(folder="", width=64, layers=2, heads=4, seed=7)  # as in experiments/demo.py
    config.vae = _autoencoder(tiny)
    # Run, checkpoint or imported folder whose transformer the first stage starts from; "": random weights.
    config.start = dict(folder="")
    # The order of the stages, because a config does not keep the order of its keys.
    config.order = tuple(stage.__name__.rpartition(".")[2] for stage in STAGES)
    config.stages = {stage.__name__.rpartition(".")[2]: stage.get_config(form) for stage in STAGES}
    return config


def _autoencoder(tiny: bool) -> dict[str, Any]:
    return dict(
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
        crop=32 if tiny else 160,  # the narrowest bucket of the first stage, of 3:1, is 160 pixels high
        loss="squared" if tiny else "absolute",
        batch_size=16 if tiny else 4_096,
        ema_decay=0.99 if tiny else 0.9999,
        ema_ramp=True,  # it starts from random weights, which the EMA of a shortened run must not contain
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
        statistics_batches=8 if tiny else 64,  # batches from which the latents' mean and deviation are measured
    )
