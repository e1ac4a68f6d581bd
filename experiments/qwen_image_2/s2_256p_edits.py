"""Stage 2: 256p, edits join.

Command: `qi2 data select DIR --config experiments/qwen_image_2/s2_256p_edits.py`.
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests."""
    return base.stage(form, sides=(256,), thresholds=base.PRE_TRAINING, tasks=(9, 1))
