"""Stage 5: 512p, 1024p and 2048p.

Command: `qi2 data select DIR --config experiments/qwen_image_2/s5_2048p.py`.
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests."""
    return base.stage(form, sides=(512, 1024, 2048), thresholds=base.CONTINUAL, tasks=(7, 3))
