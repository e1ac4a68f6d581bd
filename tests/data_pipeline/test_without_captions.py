"""Images without captions train the autoencoder and nothing else: every other step counts them."""

import numpy as np
import pytest

from data_pipeline.funnel import Tally
from data_pipeline.loading.crop_batches import CropStream
from data_pipeline.loading.crops import TextImages
from data_pipeline.records.shards import RecordFolder
from data_pipeline.samples.held_out import HoldOut
from data_pipeline.samples.items import ItemPreparer
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.report import write_report
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from data_pipeline.sources import Options
from data_pipeline.sources.ingest import ingest
from qi2_jax.workflows.config import load_experiment
from qi2_jax.workflows.data import images_of
from tests.data_pipeline.samples.test_held_out import Encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory, picture):
    """Scored records of two images with a caption, one with an unusable caption, and two without any."""
    root = tmp_path_factory.mktemp("without_captions")
    (root / "images").mkdir()
    for number in range(5):
        picture(number, (90, 80)).save(root / "images" / f"{number}.png")
    for number, text in ((0, "a picture for a test"), (1, "another picture for a test"), (2, "?")):
        (root / "images" / f"{number}.txt").write_text(text)
    report = ingest(root / "images", root / "records", Options(without_captions=True), progress=False)
    assert report.records == 5 and report.lost.counts == {"no_caption": 2}
    score(root / "records", workers=1, progress=False)
    return root / "records"


def test_only_a_selection_for_the_autoencoder_keeps_them(folder):
    selection = select(folder, Thresholds(min_side=30))
    assert selection.keys == ("0.png", "1.png")
    assert {key: why.reason for key, why in selection.dropped.items()} == {
        "2.png": "too_short",
        "3.png": "no_caption",
        "4.png": "no_caption",
    }
    selection = select(folder, Thresholds(min_side=30), without_captions=True)
    assert [(kept.key, kept.captions) for kept in selection.kept] == [
        ("0.png", (0,)),
        ("1.png", (0,)),
        ("2.png", ()),
        ("3.png", ()),
        ("4.png", ()),
    ]


def test_the_autoencoder_trains_on_them_and_the_cache_leaves_them_out(folder):
    kept = select(folder, Thresholds(min_side=30), without_captions=True).kept
    data = load_experiment("experiments/qwen_image_2/s1_256p_t2i.py:tiny").data
    images = images_of(folder, kept, data.resolutions, 3)
    assert len(images) == 5 and images.captions(4) == []
    stream = CropStream(TextImages(images), range(5), (32, 32), seed=0).crops()
    crops = np.stack([stream[number] for number in range(5)])
    assert crops.shape == (5, 32, 32, 3) and np.abs(crops).max() <= 1
    left_out = Tally()
    records = RecordFolder(folder)
    preparer = ItemPreparer(records, data.resolutions, Encoders(), HoldOut(records, 0.0))
    items = [item for batch in preparer.batches(kept, left_out) for item in batch]
    assert {item.kept.key for item in items} == {"0.png", "1.png"} and left_out.counts == {"no_caption": 3}


def test_a_report_shows_them(folder, tmp_path):
    selection = select(folder, Thresholds(min_side=30), without_captions=True)
    write_report(
        tmp_path / "page.html", folder, selection, load_experiment("experiments/demo.py:tiny").data.resolutions
    )
    assert (tmp_path / "page.html").stat().st_size > 1000
