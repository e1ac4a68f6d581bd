"""What the six stages of the curriculum share, and the ladder of their data.

The Qwen-Image-2.0 report names the filters of each stage and gives no threshold: every number here is ours, chosen
after public recipes (LAION, DataComp, Qwen-Image 1) and measurements on real pictures, to be calibrated on the data.
"""

import dataclasses
from typing import Any

import ml_collections

from data_pipeline.buckets import RATIOS
from data_pipeline.selection import Thresholds

# Stage 1, kept by all later ones: broken files, resolution, duplicates, NSFW, orientation, entropy, alignment, length.
PRE_TRAINING: dict[str, Any] = dict(
    min_side=256,  # Qwen-Image 1 leaves out what is smaller
    max_aspect=3.0,  # the buckets end at 1:3 and 3:1
    max_nsfw=0.5,  # the usual cut of open_nsfw and of CLIP-based detectors
    min_alignment_percentile=20.0,  # a percentile, since scores of different CLIPs do not compare
    min_tokens=3,
    max_tokens=1024,  # the longest captions of the report
    require=("nsfw", "alignment"),
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
# Stage 4 adds image quality, aesthetics and compression quality.
CONTINUAL: dict[str, Any] = dict(
    PRE_TRAINING,
    min_side=512,  # the smallest area trained
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
# Stage 6, the distribution filter: the same operators, stricter, and classes capped.
FINE_TUNING: dict[str, Any] = dict(
    CONTINUAL,
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


def stage(
    form: str, *, sides: tuple[int, ...], thresholds: dict[str, Any], tasks: tuple[int, int]
) -> ml_collections.ConfigDict:
    """The config of one stage.

    Args:
      form: "" or "tiny", the same with areas of a quarter the side and without models that have to be brought.
      sides: of the squares whose area its buckets have, in pixels; an image goes to the largest that it fills.
      thresholds: changes to the defaults of `Thresholds`.
      tasks: shares of text-to-image steps and of edit steps, as the report gives them.

    Raises:
      ValueError: for another form.
    """
    if form not in ("", "tiny"):
        raise ValueError(f"a stage has no form {form!r}, only 'tiny'")
    chosen = dict(dataclasses.asdict(Thresholds()), **thresholds, edits=tasks[1] > 0)
    if form == "tiny":
        sides = tuple(side // 4 for side in sides)
        chosen |= dict(min_side=chosen["min_side"] // 4, require=(), min_alignment_percentile=0.0)
    config = ml_collections.ConfigDict()
    config.platform = "cpu" if form == "tiny" else ""
    config.encode = dict(
        text="cached",  # features are computed once and stored, or "online": in every step of training
        dtype="float32" if form == "tiny" else "bfloat16",
        batch_size=8 if form == "tiny" else 64,  # images or prompts at once, of each process
        mesh=dict(data=1 if form == "tiny" else 4, fsdp=1, tensor=1),  # of each process: a TPU host has four chips
        records_per_unit=16_384,  # what is encoded, stored, and done again after a kill, as a whole
    )
    config.data = dict(
        sides=sides,
        ratios=RATIOS,
        max_upscale=1.0,  # never enlarged: a model would learn the blur
        max_cropped=0.25,
        smaller_too=True,  # small areas would else see small originals alone
        mixture=dict(
            sides=(1,) * len(sides),  # as many steps of every area; ours
            tasks=tasks,
            conditions=(8, 1, 1),  # of edit steps, those with one, two and three condition images; ours
        ),
        thresholds=chosen,
    )
    return config
