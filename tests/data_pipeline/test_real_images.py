"""Filters on real images: what is kept and what is dropped of Debian's backgrounds and stamps."""

import pytest

from data_pipeline.filters import CASCADE
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from data_pipeline.sources.ingest import ingest
from tests.data_pipeline import real_images

CHEAP = tuple(filter for filter in CASCADE if filter.name != "nsfw")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """scored(write): the folder of records, scored by the cheap filters, of what `write` wrote."""

    def make(write):
        root = tmp_path_factory.mktemp("real")
        count = write(root / "images")
        report = ingest(root / "images", root / "records", records_per_shard=64, progress=False)
        assert report.records == count and not report.refused.total
        score(root / "records", filters=CHEAP, workers=2, progress=False)
        return root / "records"

    return make


def test_backgrounds(scored):
    selection = select(scored(real_images.write_backgrounds))
    by_reason = {}
    for key, dropped in selection.dropped.items():
        by_reason.setdefault(dropped.reason, {})[key] = dropped.duplicate_of
    # Three sizes of one image are one, and so may be tints of one; what is white on nothing is not seen on white.
    near = by_reason.pop("near")
    for name in ("abstract/Elephants.jpg", "abstract/Elephants_3840x2160.jpg"):
        assert near.pop(name) == "abstract/Elephants_5640x3172.jpg"  # the largest is kept
    assert all("Ubuntu-Mate" in key and "Ubuntu-Mate" in original for key, original in near.items())
    invisible = {
        f"abstract/{name}.png"
        for name in ("Arc-Colors-Transparent-Wallpaper", "Flow", "Silk", "Spring", "Waves", "Gulp")
    }
    assert set(by_reason.pop("empty")) == invisible | {"desktop/MATE-Stripes-Light.png"}
    assert not by_reason
    assert sum(key.startswith("nature/") for key in selection.keys) == 12


def test_stamps(scored):
    kinds = ("military", "naturalforces", "people", "space", "food")
    folder = scored(lambda folder: real_images.write_stamps(folder, kinds))
    selection = select(folder, Thresholds(min_side=64))
    reasons = {key: dropped.reason for key, dropped in selection.dropped.items() if dropped.step != "resolution"}
    # A white bolt of lightning, seen through alpha only, and the one stamp that is in the package twice.
    assert reasons == {"naturalforces/lightningbolt.png": "empty", "people/fireman240a.png": "same_bytes"}
    assert len(selection.keys) > 50
    assert sum(len(kept.captions) for kept in selection.kept) > 20 * len(selection.kept)
