"""Stage 1: text-to-image at 256p.

Command: `qi2 data select DIR --config experiments/qwen_image_2/s1_256p_t2i.py`.
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests."""
    return base.stage(form, sides=(256,), thresholds=base.PRE_TRAINING, tasks=(1, 0))
