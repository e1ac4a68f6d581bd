"""Stage 2: 256p, with edits.

Command: as part of `qi2 run experiments/qwen_image_2/curriculum.py`. Alone, with C for this file:
`qi2 data select RECORDS --config C`, `qi2 data cache RECORDS --config C --model MODEL --out SAMPLES`, then
`qi2 train C --samples SAMPLES --model MODEL --start RUN_BEFORE --out RUN`.
Hardware: four slices of 256 v6e chips; the tiny form a CPU, as a mesh of 8 fake devices.
Time: 2.0 s per update and 2 days in total; not measured, but computed
by formula at 40% utilisation (`python -m tests.benchmarks.stage_cost`).
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests, others are kinds of chips, see `chips.py`."""
    return base.stage(
        form,
        number=2,
        sides=(256,),
        side_shares=(1,),
        thresholds=base.PRE_TRAINING,
        tasks=(9, 1),
        steps=100_000,
        lr=0.0001,
        tiny_steps=40,
        tiny_conditions=(1, 1, 1),
    )
