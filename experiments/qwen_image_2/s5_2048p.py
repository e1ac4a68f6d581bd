"""Stage 5: 512p, 1024p and 2048p, from images whose shorter side has 2048 pixels.

Command: as part of `qi2 run experiments/qwen_image_2/curriculum.py`. Alone, with C for this file:
`qi2 data select RECORDS --config C`, `qi2 data cache RECORDS --config C --model MODEL --out SAMPLES`, then
`qi2 train C --samples SAMPLES --model MODEL --start RUN_BEFORE --out RUN`.
Hardware: four slices of 256 v6e chips; the tiny form a CPU, as a mesh of 8 fake devices.
Time: 12.3 s per update and 14 days in total; not measured, but computed
by formula at 40% utilisation (`python -m tests.benchmarks.stage_cost`).
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests, others are kinds of chips, see `chips.py`."""
    return base.stage(
        form,
        number=5,
        sides=(512, 1024, 2048),
        side_shares=(1, 1, 2),
        thresholds=base.LARGEST,
        tasks=(7, 3),
        steps=100_000,
        lr=2e-05,
        tiny_steps=40,
    )
