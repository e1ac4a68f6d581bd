"""What the six stages of the curriculum share: the ladder of their data, the model, and how it is trained.

The Qwen-Image-2.0 report names the filters of each stage. Of their thresholds it gives those of resolution alone: 256
in stage 1, 1024 in stage 4, 2048 in stage 5. Every other number of the data is ours, chosen after public recipes
(LAION, DataComp, Qwen-Image 1) and measurements on real pictures, to be calibrated on the data. Of training it gives
steps, images per batch at each resolution, learning rates, weight decay, clipping, dropout and the shares of the tasks
(its Table 2); what else is chosen here says why.
"""

import dataclasses
from typing import Any

import ml_collections

from data_pipeline.buckets import RATIOS
from data_pipeline.selection.thresholds import Thresholds
from experiments import defaults

# Stage 1, kept by all later ones: broken files, resolution, duplicates, NSFW, orientation, entropy, alignment, length.
PRE_TRAINING: dict[str, Any] = dict(
    # The report's Resolution(256). We read the figure as the shorter side: Qwen-Image 1 leaves out what is smaller.
    min_side=256,
    max_aspect=3.0,  # the buckets end at 1:3 and 3:1
    max_nsfw=0.5,  # the usual cut of open_nsfw and of CLIP-based detectors
    min_alignment_percentile=20.0,  # a percentile, since scores of different CLIPs do not compare
    min_tokens=3,
    max_tokens=1024,  # the longest captions of the report
    require=("nsfw", "alignment"),
    synthetic=False,  # joins in stage 3
    # Edits, by their class: measured on generated pairs and on spoilt ones (tests/benchmarks/edit_pairs.py).
    max_instruction_tokens=512,
    min_script=0.2,
    max_edit_aspect=1.03,  # a pixel or two of rounding
    min_shared=0.2,  # other scenes stay below 0.1
    max_shift=0.004,  # a pixel at 256p
    min_changed=0.0005,
    max_changed=0.7,
    min_difference=1.0,
    min_unchanged_psnr=32.0,  # sources and targets compressed apart, as JPEG 95 and 90, lie above
)
# Stage 3 adds synthetic pictures.
WITH_SYNTHETIC: dict[str, Any] = dict(PRE_TRAINING, synthetic=True)
# Stage 4 asks for its largest area, the report's Resolution(1024), whose pictures, reduced, also fill the smaller one;
# and adds image quality, aesthetics and compression quality.
CONTINUAL: dict[str, Any] = dict(
    WITH_SYNTHETIC,
    min_side=1024,
    min_clarity=8.0,  # photographs after a blur of 3 pixels lie below 4
    min_brightness=0.05,
    max_brightness=0.97,
    max_noise=12.0,
    min_jpeg_quality=75.0,
    min_bits_per_pixel=0.4,
    max_border=0.1,
    min_aesthetic=4.5,  # LAION's first set; 5 and 6 are its later ones
    require=("nsfw", "alignment", "aesthetic"),
)
# Stage 5 adds the report's Resolution(2048) alone.
LARGEST: dict[str, Any] = dict(CONTINUAL, min_side=2048)
# Stage 6, the distribution filter: the same operators, stricter, and classes capped. It has no resolution of its own in
# the report; stricter operators pass nothing that stage 5 leaves out, and the report's figure 6 labels it 2048p.
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


# The report's "32K" images at 256p, halved with each resolution; as powers of two they split over any number of chips.
BATCH_SIZES = {256: 32_768, 512: 16_384, 1024: 8_192, 2048: 4_096}
# Four slices of 256 v6e chips (31 GiB each): parameters are gathered within a slice, gradients summed across slices
# (`sharding.make_mesh`).
# From 1024p on, four chips share an image: with three condition images a sequence has up to 67 thousand slots.
SMALL_MESH, LARGE_MESH = dict(data=4, fsdp=256, tensor=1), dict(data=4, fsdp=64, tensor=4)
# What one of these chips, or four of them, compute at once with room to spare (`tests/benchmarks/stage_cost.py`).
SMALL_AT_ONCE, LARGE_AT_ONCE = {256: 8, 512: 2}, {512: 8, 1024: 2, 2048: 1}
TINY = 4  # a tiny stage has sides of a quarter
# Nor does it ask for more: ten of the tiny curriculum's pairs have a shorter side of 512, and one of them is held.
TINY_MIN_SIDE = 256
# By time: a save every 40 to 45 minutes, in stage 4 every 21 (`tests/benchmarks/stage_cost.py`). So much is lost when
# hosts are lost, and a save, which goes on beside the steps, has long ended when the next begins. Both divide 50,000,
# whose multiples are kept for good.
SMALL_SAVE_EVERY, LARGE_SAVE_EVERY = 500, 200
# Validation: every 1.4 hours in stage 1, every 3.6 in stage 5. By formula it computes as much as a fifth of an update
# there, where rows fill up every chip, and here, with 12 streams, as 4 updates: less than 0.5% of the time.
VALIDATE_EVERY = 1_000
# Pictures, whose sampling computes up to twice as much, and whose decoding and writing the chips wait for: less often.
DRAW_EVERY = 5_000
# An update takes 5 to 78 s (2048p with three condition images) at 40% utilisation: none is dispatched ahead, so that
# SIGTERM ends one between two of its parts, and the watchdog waits for one at a time. Its limit leaves room for a tenth
# of that utilisation: no step was timed on these chips yet.
AHEAD, WATCHDOG_SECONDS = 0, 900.0

# Drawn while training, the same in every stage: ours, one for each thing that is judged by eye.
PROMPTS = (
    # light, skin and texture
    "A photograph of an old fisherman mending a green net on a wooden pier at sunrise, mist over the harbour, shallow "
    "depth of field.",
    # letters, in both scripts
    'A bakery window at night with the words "Open until midnight" in glowing red neon, rain on the glass.',
    "雨后的老街上有一家茶馆，门口的木牌上用毛笔写着“清风茶舍”四个字。",
    # layout: parts of a page, each in its place
    'A concert poster in orange and black: the title "NORTH WIND" in large capitals at the top, a line drawing of a '
    'cello in the middle, and at the bottom in small letters "12 October, 8 pm, Town Hall".',
    # counting, and what is where
    "Three red apples in a row on a white table; to the left of them a blue jug, behind them a single yellow pear.",
)
# Likewise of the stages that train on edits. The pictures come with scikit-image (pip install 'qi2[demo]') and are free
# of rights; they have about 512 pixels a side, and are enlarged above.
EDITS = (
    # identity: the same face
    (
        "The same woman, her face and her smile unchanged, in a dark green raincoat on a rainy street at night.",
        "scikit-image:astronaut.png",
    ),
    # a local change: nothing else moves
    ("Make the cup and the saucer blue; the coffee, the spoon and the table stay.", "scikit-image:coffee.png"),
    # letters where there were none
    ('Write "LIFT-OFF" in large white capitals on the sky to the right of the rocket.', "scikit-image:rocket.jpg"),
    # two images: what comes from which
    (
        "The cat of the first picture looks over the edge of the table of the second one, behind the cup.",
        "scikit-image:chelsea.png",
        "scikit-image:coffee.png",
    ),
)
# Two captions of the pictures that the tiny form trains on, and one edit: another number of images is another program.
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
    of_sides: tuple[int, ...],
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
      number: of the stage; a thousand times it is the seed, so that no stage repeats the order, times and noise of
        another: streams and validation take the numbers that follow the seed.
      form: "" or "tiny", the same with areas of a quarter the side, a tiny model on a CPU, and without models that have
        to be brought.
      sides: of the squares whose area its buckets have, in pixels.
      of_sides: shares of the steps of each.
      thresholds: changes to the defaults of `Thresholds`.
      tasks: shares of text-to-image steps and of edit steps, as the report gives them.
      steps, lr, ema_decay: of the optimizer, and of the average of its parameters.
      ema_ramp: whether that average ramps up, which forgets the parameters that a stage begins with.
      tiny_steps, tiny_conditions: steps of the tiny form, and its shares of one, two and three condition images: every
        number of them is another program to compile, for every side.

    Raises:
      ValueError: for another form.
    """
    if form not in ("", "tiny"):
        raise ValueError(f"a stage has no form {form!r}, only 'tiny'")
    tiny = form == "tiny"
    small = max(sides) < 1024
    mesh, at_once = (SMALL_MESH, SMALL_AT_ONCE) if small else (LARGE_MESH, LARGE_AT_ONCE)
    save_every = SMALL_SAVE_EVERY if small else LARGE_SAVE_EVERY
    chosen = dict(dataclasses.asdict(Thresholds()), **thresholds, edits=tasks[1] > 0)
    if tiny:
        least = min(chosen["min_side"] // TINY, TINY_MIN_SIDE)
        chosen |= dict(min_side=least, require=(), min_alignment_percentile=0.0, max_tokens=256)
    config = ml_collections.ConfigDict()
    config.platform = "cpu" if tiny else ""
    # Programs that were compiled once are read from here when `qi2 train` is started again; a path below the run's
    # folder, or a whole one such as gs://BUCKET/compiled. Empty: none are kept. A curriculum has a place of its own.
    config.compilation_cache = "compiled"
    config.encode = dict(
        # What training computes in every step instead of reading it: "nothing", "text" or "text_and_images".
        online="nothing",
        dtype="float32" if tiny else "bfloat16",
        batch_size=8 if tiny else 64,  # images or prompts at once, of each process
        mesh=dict(data=1 if tiny else 4, fsdp=1, tensor=1),  # of each process: a TPU host has four chips
        records_per_unit=16_384,  # what is encoded, stored, and done again after a kill, as a whole
    )
    config.data = dict(
        sides=tuple(side // TINY for side in sides) if tiny else sides,
        ratios=RATIOS,
        max_upscale=1.0,  # never enlarged: a model would learn the blur
        max_cropped=0.25,
        smaller_too=True,  # small areas would else see small originals alone
        # Of all pictures, those that no stage trains on; the same in every stage. Ours: it costs nothing, and gives
        # streams from 2.6M samples on the 256 that validation reads, smaller ones fewer.
        held_out=0.15 if tiny else 0.0001,
        mixture=dict(
            # Ours: half of the steps go to the area that a stage adds, the others keep what is learned.
            sides=of_sides,
            tasks=tasks,
            # Of edit steps, those with one, two and three condition images. Ours: most edits have one source.
            conditions=tiny_conditions if tiny else (8, 1, 1),
        ),
        thresholds=chosen,
    )
    config.transformer = dict(
        seed=1_000 * number,
        model=dict(
            layers=2 if tiny else 32,
            heads=2 if tiny else 32,
            head_width=32 if tiny else 128,
            mlp_ratio=3,
            rope_dims=(8, 12, 12) if tiny else (16, 56, 56),
            eps=1e-6,
            attention="block_causal",  # of the published weights; the report implies "bidirectional"
            condition_timestep="zero",
        ),
        mesh=dict(data=2, fsdp=2, tensor=2) if tiny else mesh,
        execution=dict(dtype="float32" if tiny else "bfloat16", kernel="auto", remat=not tiny),
        batch_sizes=(8,) * len(sides) if tiny else tuple(BATCH_SIZES[side] for side in sides),
        images_per_device=(1,) * len(sides) if tiny else tuple(at_once[side] for side in sides),
        batches_per_update=1,  # the report's batch sizes are those of one resolution
        dropout=0.1,  # the report's, of the text
        # Ours: an average over 10K steps, a tenth of the shortest long stage; over 1K in the 10K steps of fine-tuning.
        ema_decay=0.9 if tiny else ema_decay,
        # Ours: only stage 1 begins with random parameters; the others inherit an average that is worth keeping.
        ema_ramp=ema_ramp,
        # Ours: logit-normal as in the first report, shifted by the published scheduler of Qwen-Image-2.1, so that
        # training sees the times at which it is sampled.
        timesteps=defaults.timesteps(),
        start=defaults.start(),
        lora=defaults.lora(),
        validation=dict(every=1_000_000 if tiny else VALIDATE_EVERY, samples=4 if tiny else 256),
        samples=defaults.samples(
            every=1_000_000 if tiny else DRAW_EVERY,
            count=2 if tiny else 8,
            steps=4 if tiny else 40,
            prompts=TINY_PROMPTS if tiny else PROMPTS,
            edits=(TINY_EDITS if tiny else EDITS) if tasks[1] else (),
        ),
        # The report says Adam with weight decay: we take it as AdamW, decoupled, on matrices alone, as is usual.
        optimizer=dict(
            lr=2e-3 if tiny else lr,
            # Ours: 0.95 forgets a bad gradient within a hundred steps, usual for large batches.
            betas=(0.9, 0.95),
            eps=1e-8,  # of Adam's authors
            weight_decay=0.001,
            clip=1.0,
            warmup=4 if tiny else 1_000,  # ours; every stage begins with fresh moments
            decay_steps=0,  # the report gives one rate for each phase
        ),
        train=defaults.train(tiny_steps, log_every=1)
        if tiny
        else defaults.train(steps, ahead=AHEAD, log_every=20, watchdog_seconds=WATCHDOG_SECONDS),
        checkpoint=defaults.checkpoint(10) if tiny else defaults.checkpoint(save_every, keep=3, keep_every=50_000),
        profile=defaults.profile(),
    )
    return config
