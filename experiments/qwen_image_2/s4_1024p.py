"""Stage 4: 512p and 1024p, filters of quality, aesthetics and compression join.

Command: `qi2 data select DIR --config experiments/qwen_image_2/s4_1024p.py`.
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests."""
    return base.stage(form, sides=(512, 1024), thresholds=base.CONTINUAL, tasks=(7, 3))
