"""What the six stages of the curriculum share: thresholds for their data, the model, and how it is trained.

The Qwen-Image-2.0 report names the filters of each stage, but gives only the thresholds for resolution: 256 in stage 1,
1024 in stage 4, 2048 in stage 5. We chose all other thresholds after public recipes (LAION, DataComp, Qwen-Image 1) and
measurements on real images; they should be calibrated on your data. For training, the report gives steps, images per
batch at each resolution, learning rates, weight decay, clipping, dropout and the shares of the tasks (its Table 2). A
comment explains every other choice, and "ours" marks it.
"""

import dataclasses
from typing import Any

import ml_collections

from data_pipeline.buckets import RATIOS
from data_pipeline.selection.thresholds import Thresholds
from experiments import defaults
from experiments.qwen_image_2 import chips

# Stage 1, and all later ones: broken files, resolution, duplicates, NSFW, orientation, entropy, alignment, length.
PRE_TRAINING: dict[str, Any] = dict(
    # The report's Resolution(256). We take the number as the shorter side: Qwen-Image 1 drops smaller images.
    min_side=256,
    max_aspect=3.0,  # the buckets end at 1:3 and 3:1
    max_nsfw=0.5,  # the usual cut of open_nsfw and of CLIP-based detectors
    min_alignment_percentile=20.0,  # a percentile, because scores of different CLIP models are not comparable
    min_tokens=3,
    max_tokens=1024,  # the longest captions of the report
    require=("nsfw", "alignment"),
    synthetic=False,  # from stage 3 on
    # Edits, by class: measured on generated pairs and on corrupted ones (tests/benchmarks/edit_pairs.py).
    max_instruction_tokens=512,
    min_script=0.2,
    max_edit_aspect=1.03,  # a pixel or two of rounding
    min_shared=0.2,  # images of different scenes have less than 0.1
    max_shift=0.004,  # a pixel at 256p
    min_changed=0.0005,
    max_changed=0.7,
    min_difference=1.0,
    min_unchanged_psnr=32.0,  # pairs whose images were compressed separately, as JPEG 95 and 90, are above
)
# Stage 3 adds synthetic images.
WITH_SYNTHETIC: dict[str, Any] = dict(PRE_TRAINING, synthetic=True)
# Stage 4 requires its largest area, the report's Resolution(1024); these images, downsampled, also fill the smaller
# one. It adds image quality, aesthetics and compression quality.
CONTINUAL: dict[str, Any] = dict(
    WITH_SYNTHETIC,
    min_side=1024,
    min_clarity=8.0,  # photographs after a blur of 3 pixels are below 4
    min_brightness=0.05,
    max_brightness=0.97,
    max_noise=12.0,
    min_jpeg_quality=75.0,
    min_bits_per_pixel=0.4,
    max_border=0.1,
    min_aesthetic=4.5,  # the threshold of LAION's first set; its later sets have 5 and 6
    require=("nsfw", "alignment", "aesthetic"),
)
# Stage 5 adds only the report's Resolution(2048).
LARGEST: dict[str, Any] = dict(CONTINUAL, min_side=2048)
# Stage 6, the distribution filter: the same filters, stricter, and a maximum for each class. The report gives no
# resolution for it; we keep that of stage 5, because its filters are stricter than those and figure 6 labels it 2048p.
FINE_TUNING: dict[str, Any] = dict(
    LARGEST,
    max_nsfw=0.2,
    min_alignment_percentile=50.0,
    min_clarity=12.0,
    min_jpeg_quality=85.0,
    max_border=0.02,
    min_aesthetic=5.5,
    max_per_class=200_000,
    max_shift=0.002,
    min_unchanged_psnr=35.0,
)


# The report's "32K" images at 256p, halved with each resolution; powers of two split over any number of chips.
BATCH_SIZES = {256: 32_768, 512: 16_384, 1024: 8_192, 2048: 4_096}
TINY = 4  # a tiny stage has sides of a quarter
# A larger minimum would leave too little: ten of the tiny curriculum's pairs have a shorter side of 512, and one of
# these is held out.
TINY_MIN_SIDE = 256
# A checkpoint every 16 to 20 minutes, at 2048p every 41 (`tests/benchmarks/stage_cost.py`). A failure costs at most
# this time, and an asynchronous save is done long before the next one starts. Both numbers divide 50,000, whose
# multiples are never deleted.
SMALL_SAVE_EVERY, LARGE_SAVE_EVERY = 500, 200
# Validation: every half an hour in stage 1, every 3.4 hours in stage 5. By formula it costs half an update in stage
# 1, and 4 updates in stage 5 with its 12 streams: less than 0.5% of the time.
VALIDATE_EVERY = 1_000
# Sample images cost up to twice as much, and the chips wait while they are decoded and written: less often.
DRAW_EVERY = 5_000
# An update takes 2 to 78 s (2048p with three condition images) at 40% utilisation. None is dispatched ahead, so that
# SIGTERM can interrupt one between two microbatches, and the watchdog measures single updates. The
# watchdog limit tolerates 4% utilisation: no step has been timed on these chips yet.
AHEAD, WATCHDOG_SECONDS = 0, 900.0

# Fixed prompts that are drawn during training, the same in every stage: ours, one for each thing that is judged by eye.
PROMPTS = (
    # light, skin and texture
    "A photograph of an old fisherman mending a green net on a wooden pier at sunrise, mist over the harbour, shallow "
    "depth of field.",
    # letters, in both scripts
    'A bakery window at night with the words "Open until midnight" in glowing red neon, rain on the glass.',
    "雨后的老街上有一家茶馆，门口的木牌上用毛笔写着“清风茶舍”四个字。",
    # layout: the parts of a page
    'A concert poster in orange and black: the title "NORTH WIND" in large capitals at the top, a line drawing of a '
    'cello in the middle, and at the bottom in small letters "12 October, 8 pm, Town Hall".',
    # counting and spatial relations
    "Three red apples in a row on a white table; to the left of them a blue jug, behind them a single yellow pear.",
)
# Fixed edits of the stages that train on edits. The images come with scikit-image (pip install 'qi2[demo]') and are
# free of rights; they have about 512 pixels a side, and are upsampled at larger resolutions.
EDITS = (
    # identity: the same face
    (
        "The same woman, her face and her smile unchanged, in a dark green raincoat on a rainy street at night.",
        "scikit-image:astronaut.png",
    ),
    # a local change: nothing else may move
    ("Make the cup and the saucer blue; the coffee, the spoon and the table stay.", "scikit-image:coffee.png"),
    # new letters
    ('Write "LIFT-OFF" in large white capitals on the sky to the right of the rocket.', "scikit-image:rocket.jpg"),
    # two images: what comes from which one
    (
        "The cat of the first picture looks over the edge of the table of the second one, behind the cup.",
        "scikit-image:chelsea.png",
        "scikit-image:coffee.png",
    ),
)
# Two captions of the tiny form's training images, and one edit: another number of images would need another program.
TINY_PROMPTS = (
    'A red square with the white word "OPEN" in the middle.',
    "Black silhouette of a standing horse, seen from the side, facing right, on white.",
)
TINY_EDITS = (("Make the cup and the saucer blue.", "scikit-image:coffee.png"),)


def stage(
    form: str,
    *,
    number: int,
    sides: tuple[int, ...],
    side_shares: tuple[int, ...],
    thresholds: dict[str, Any],
    tasks: tuple[int, int],
    steps: int,
    lr: float,
    tiny_steps: int,
    ema_decay: float = 0.9999,
    ema_ramp: bool = False,
    tiny_conditions: tuple[int, int, int] = (1, 0, 0),
) -> ml_collections.ConfigDict:
    """The config of one stage.

    Args:
      form: a generation of chips, see `chips.CHOICES`, or "tiny" for the same stage with areas of a quarter of the side
        and a tiny model, on a CPU, and without filters whose models the user must bring.
      number: number of the stage. A thousand times it is the seed: streams and validation take the seeds that follow
        it, and no stage repeats the order, times and noise of another one.
      sides: sides of the squares whose areas the buckets have, in pixels.
      side_shares: share of the steps for each side.
      thresholds: changes to the defaults of `Thresholds`.
      tasks: shares of text-to-image steps and of edit steps, from the report.
      steps, lr: number of updates and learning rate, from the report.
      tiny_steps: number of updates of the tiny form.
      ema_decay: decay of the EMA.
      ema_ramp: whether the decay ramps up, so that the EMA forgets the weights from which the stage starts.
      tiny_conditions: tiny form's shares of edits with one, two and three condition images; each number with a
        share is a program to compile, for every side.

    Raises:
      ValueError: for another form.
    """
    if form not in (*chips.CHOICES, "tiny"):
        raise ValueError(f"a stage has no form {form!r}, only {['tiny', *filter(None, chips.CHOICES)]}")
    tiny = form == "tiny"
    config = ml_collections.ConfigDict()
    config.platform = "cpu" if tiny else ""
    # Folder in which compiled programs are kept, so that a restart of `qi2 train` does not compile them again: a path
    # below the run's folder, or an absolute one such as gs://BUCKET/compiled; "": none. A curriculum has a key for all.
    config.compilation_cache = "compiled"
    config.encode = _encode(tiny)
    config.data = _data(tiny, sides, side_shares, thresholds, tasks, tiny_conditions)
    config.transformer = _transformer(form, sides) | dict(
        seed=1_000 * number,
        # Ours: the EMA spans 10K steps, a tenth of the shortest long stage; in the 10K steps of fine-tuning 1K.
        ema_decay=0.9 if tiny else ema_decay,
        # Ours: only stage 1 starts from random weights; the others inherit an EMA that is worth keeping.
        ema_ramp=ema_ramp,
        samples=_samples(tiny, tasks),
        optimizer=_optimizer(tiny, lr),
        train=defaults.train(tiny_steps, log_every=1)
        if tiny
        else defaults.train(steps, ahead=AHEAD, log_every=20, watchdog_seconds=WATCHDOG_SECONDS),
    )
    return config


def _encode(tiny: bool) -> dict[str, Any]:
    return dict(
        # What training computes in every step instead of reading it: "nothing", "text" or "text_and_images".
        online="nothing",
        dtype="float32" if tiny else "bfloat16",
        batch_size=8 if tiny else 64,  # images or prompts that each process encodes at once
        mesh=dict(data=1 if tiny else 4, fsdp=1, tensor=1),  # of each process: a TPU host has four chips
        records_per_unit=16_384,  # records that are encoded, stored, and after a kill encoded again as a whole
    )


def _data(
    tiny: bool,
    sides: tuple[int, ...],
    side_shares: tuple[int, ...],
    thresholds: dict[str, Any],
    tasks: tuple[int, int],
    tiny_conditions: tuple[int, int, int],
) -> dict[str, Any]:
    chosen = dict(dataclasses.asdict(Thresholds()), **thresholds, edits=tasks[1] > 0)
    if tiny:
        least = min(chosen["min_side"] // TINY, TINY_MIN_SIDE)
        chosen |= dict(min_side=least, require=(), min_alignment_percentile=0.0, max_tokens=256)
    return dict(
        sides=tuple(side // TINY for side in sides) if tiny else sides,
        ratios=RATIOS,
        max_upscale=1.0,  # no upsampling: the model would learn its blur
        max_cropped=0.25,
        smaller_too=True,  # otherwise small areas would see only small originals
        # Fraction of all images on which no stage trains, the same in every stage. Ours: it costs nothing, and from
        # 2.6M samples on gives a stream the 256 held-out samples that validation reads.
        held_out=0.25 if tiny else 0.0001,
        mixture=dict(
            # Ours: half of the steps go to the area that a stage adds, the others keep what was learned.
            sides=side_shares,
            tasks=tasks,
            # Shares of edit steps with one, two and three condition images. Ours: most edits have one source.
            conditions=tiny_conditions if tiny else (8, 1, 1),
        ),
        thresholds=chosen,
    )


def _transformer(form: str, sides: tuple[int, ...]) -> dict[str, Any]:
    tiny = form == "tiny"
    choice = chips.Choice(2, 2, 2, {}, 0, 0.0) if tiny else chips.choice_for(form, max(sides))
    save_every = SMALL_SAVE_EVERY if max(sides) < 1024 else LARGE_SAVE_EVERY
    return dict(
        model=dict(
            layers=2 if tiny else 32,
            heads=2 if tiny else 32,
            head_width=32 if tiny else 128,
            mlp_ratio=3,
            rope_dims=(8, 12, 12) if tiny else (16, 56, 56),
            eps=1e-6,
            attention="block_causal",  # as in the published weights; the report implies "bidirectional"
            condition_timestep="zero",
        ),
        mesh=dict(data=choice.data, fsdp=choice.fsdp, tensor=choice.tensor),
        execution=dict(
            dtype="float32" if tiny else "bfloat16",
            kernel="auto",
            remat=not tiny,
            keep="inputs" if tiny else "fit",
            activations_gib=choice.activations_gib,
            blocks_per_step=choice.blocks,
            shard_sum="bfloat16",
            replica_sum="float32",
        ),
        batch_sizes=(8,) * len(sides) if tiny else tuple(BATCH_SIZES[side] for side in sides),
        images_per_device=tuple(1 if tiny else choice.images[side] for side in sides),
        slots_per_device=choice.slots,
        batches_per_update=1,  # the report's batches have one resolution
        dropout=0.1,  # the report's, of the text
        # Ours: a window is cut into 16 x 4 parts, so the texts of a microbatch differ little in length, and a batch has
        # four lengths.
        text_slots=defaults.text_slots() if tiny else defaults.text_slots(layouts=8, window=16, pieces=4),
        # Ours: logit-normal as in the first report, with the shift of the published Qwen-Image-2.1 scheduler, so that
        # training and sampling use the same times.
        timesteps=defaults.timesteps(),
        start=defaults.start(),
        lora=defaults.lora(),
        validation=dict(every=1_000_000 if tiny else VALIDATE_EVERY, samples=4 if tiny else 256),
        checkpoint=defaults.checkpoint(10) if tiny else defaults.checkpoint(save_every, keep=3, keep_every=50_000),
        profile=defaults.profile(),
    )


def _samples(tiny: bool, tasks: tuple[int, int]) -> dict[str, Any]:
    return defaults.samples(
        every=1_000_000 if tiny else DRAW_EVERY,
        count=2 if tiny else 8,
        steps=4 if tiny else 40,
        prompts=TINY_PROMPTS if tiny else PROMPTS,
        edits=(TINY_EDITS if tiny else EDITS) if tasks[1] else (),
    )


def _optimizer(tiny: bool, lr: float) -> dict[str, Any]:
    """The report's Adam with weight decay, which we take as AdamW: decoupled, and only on matrices, as is usual."""
    return dict(
        lr=2e-3 if tiny else lr,
        # Ours: 0.95 forgets a bad gradient within a hundred steps, usual for large batches.
        betas=(0.9, 0.95),
        eps=1e-8,  # from the Adam paper
        weight_decay=0.001,
        clip=1.0,
        warmup=4 if tiny else 1_000,  # ours; every stage starts with fresh moments
        decay_steps=0,  # the report gives one rate for each phase
    )
