"""The whole curriculum: data selection, samples, and six stages.

Each stage starts from the weights and the EMA of the stage before it.

Command: `qi2 run experiments/qwen_image_2/curriculum.py --data RECORDS --out DIR model.folder=ENCODERS`; the same
command continues after an interruption. RECORDS is a folder that `qi2 data ingest` made and `qi2 data score` scored,
with a CLIP and an aesthetic head. ENCODERS is an imported folder, whose Qwen3-VL and autoencoder are used. Without
`model.folder`, `encoder.folder` names a folder of Qwen3-VL, and the autoencoder is trained first, with the weights of
the frozen networks in `weights` (docs/perceptual_weights.md).
The fixed edits that are drawn during training need images of scikit-image: `pip install 'qi2[demo]'`.
In miniature, with images that it makes itself: `qi2 run experiments/qwen_image_2/curriculum.py:tiny --out DIR`.
Hardware: four slices of 256 v6e chips; the tiny form a CPU with 2 cores, as a mesh of 8 fake devices.
Time: the sum over the stages, see each of them; the tiny form under 15 minutes.
"""

import ml_collections

from experiments.qwen_image_2 import (
    autoencoder,
    s1_256p_t2i,
    s2_256p_edits,
    s3_512p_synthetic,
    s4_1024p,
    s5_2048p,
    s6_fine_tuning,
)

STAGES = (s1_256p_t2i, s2_256p_edits, s3_512p_synthetic, s4_1024p, s5_2048p, s6_fine_tuning)


def get_config(form: str = "") -> ml_collections.ConfigDict:
    """The curriculum; the form `tiny` makes its own data and learns little.

    Raises:
      ValueError: for another form.
    """
    tiny = form == "tiny"
    config = ml_collections.ConfigDict()
    config.platform = "cpu" if tiny else ""
    # Folder in which compiled programs are kept, so that a restart does not compile them again: a path below the
    # curriculum's folder, or an absolute one such as gs://BUCKET/compiled; "": none.
    config.compilation_cache = "compiled"
    # Without --data: images of scikit-image, and numbers of edits and text-rich images that are made from them.
    config.corpus = dict(edits=90 if tiny else 0, texts=24 if tiny else 0, side=512, workers=2 if tiny else 0)
    # Model folder whose condition encoder and autoencoder are used; "": those of the next two groups.
    config.model = dict(folder="")
    config.encoder = dict(folder="", width=64, layers=2, heads=4, seed=7)  # as in experiments/demo.py
    # As it is trained alone. The narrowest bucket of the first stage, of 3:1, is 160 pixels high.
    config.vae = autoencoder.autoencoder(tiny, crop=32 if tiny else 160)
    # Run, checkpoint or imported folder whose transformer the first stage starts from; "": random weights.
    config.start = dict(folder="")
    # The order of the stages, because a config does not keep the order of its keys.
    config.order = tuple(stage.__name__.rpartition(".")[2] for stage in STAGES)
    config.stages = {stage.__name__.rpartition(".")[2]: stage.get_config(form) for stage in STAGES}
    return config
