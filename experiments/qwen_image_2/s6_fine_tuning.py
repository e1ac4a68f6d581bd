"""Stage 6: supervised fine-tuning on the best of all, evenly over the classes.

Command: `qi2 data select DIR --config experiments/qwen_image_2/s6_fine_tuning.py`.
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests."""
    return base.stage(form, sides=(512, 1024, 2048), thresholds=base.FINE_TUNING, tasks=(7, 3))
