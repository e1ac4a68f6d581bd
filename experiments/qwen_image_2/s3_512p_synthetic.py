"""Stage 3: 256p and 512p, synthetic text-rich data joins.

Command: `qi2 data select DIR --config experiments/qwen_image_2/s3_512p_synthetic.py`.
"""

import ml_collections

from experiments.qwen_image_2 import base


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The stage; the form `tiny` is for tests."""
    return base.stage(form, sides=(256, 512), thresholds=base.PRE_TRAINING, tasks=(9, 1))
