"""The guarantees of `tests/benchmarks/data_guarantees.py`, checked on few images."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageOps

from data_pipeline.filters import CASCADE
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.score_tables import read_scores
from data_pipeline.selection.rules import RULES
from data_pipeline.selection.thresholds import Thresholds
from data_pipeline.synthesis.lettering.fonts import FOLDERS
from data_pipeline.synthesis.text.synthesis import synthesize_text
from qi2_jax.config import loading
from tests import debian
from tests.data_pipeline import planted, real_images
from tests.test_experiments import EXPERIMENTS, STAGES

NO_DUPLICATES = Thresholds(drop_exact_duplicates=False, drop_near_duplicates=False)


def test_pages_are_kept():
    files = list(planted.pages(40))
    skimage = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    files += [(f"page/{name}", (skimage / name).read_bytes()) for name in ("page.png", "text.png")]
    selection = planted.select_files(files, Thresholds(min_side=100, drop_near_duplicates=False))
    assert not selection.dropped


def stages() -> list[Thresholds]:
    return [Thresholds(**loading.load(str(path)).data.thresholds) for path in map(EXPERIMENTS.get, STAGES)]


def scored(folder: Path) -> list[dict]:
    """Rows of scores, except those of models and duplicates."""
    score(folder, filters=planted.CHEAP, workers=1, progress=False)
    return list(read_scores(folder, [filter for filter in CASCADE if filter is not DUPLICATES]))


def reasons(row: dict, thresholds: Thresholds) -> set[str | None]:
    """Reasons for dropping an image, except for its captions."""
    return {RULES[rule](row, thresholds) for rule in ("entropy", "quality", "compression", "border", "watermark")}


def test_pages_stay_in_every_stage_unless_their_jpeg_files_are_poor(tmp_path):
    pages = [Record(key, data, (Caption("a page"),), "s") for key, data in planted.pages(40)]
    write_shards(tmp_path, pages, records_per_shard=64)
    rows = scored(tmp_path)
    qualities = [row["compression.jpeg_quality"] or 100 for row in rows]
    for thresholds in stages():
        poor = [quality < thresholds.min_jpeg_quality for quality in qualities]
        expected = [{None} | ({"compressed_too_much"} if one else set()) for one in poor]
        assert [reasons(row, thresholds) for row in rows] == expected
        assert sum(poor) < 20


def test_synthetic_text_stays_in_every_stage(tmp_path):
    for package, folder in zip(("fonts-noto-core", "fonts-noto-cjk"), FOLDERS, strict=True):
        debian.require_debian(package, folder)
    report = synthesize_text(
        tmp_path, count=30, strategies=("pure", "layout", "glyphs"), side=512, workers=1, progress=False
    )
    rows = scored(tmp_path)
    assert len(rows) == sum(report.made.values()) == 30
    assert sum(row["border.top"] > 0.05 and row["entropy.bits"] > 3 for row in rows) >= 2  # not only flat pages
    for thresholds in stages():
        assert all(reasons(row, thresholds) == {None} for row in rows)


@pytest.mark.parametrize("colour", ["black", "white"])
def test_a_photograph_in_a_border_is_dropped_where_a_stage_asks(tmp_path, colour):
    framed = [ImageOps.expand(picture, 80, colour) for picture in real_images.photographs(1, 480)]
    files = [Record(f"{i}.png", planted.bytes_of(x), (Caption("x"),), "s") for i, x in enumerate(framed)]
    write_shards(tmp_path, files, records_per_shard=64)
    for row in scored(tmp_path):
        dropped = ["border" in reasons(row, thresholds) for thresholds in stages()]
        assert dropped == [thresholds.max_border < 0.3 for thresholds in stages()] and any(dropped)


def test_noise_and_flat_images_are_dropped():
    selection = planted.select_files(planted.worthless(40), NO_DUPLICATES)
    assert not selection.kept
    assert {why.step for why in selection.dropped.values()} == {"entropy"}


def test_planted_near_duplicates_are_found():
    pictures = list(real_images.photographs(2, 480))
    found = [planted.near_duplicates(pictures, kind) for kind in real_images.COPIES]
    assert sum(recall for recall, _ in found) / len(found) >= 0.95, found
    assert min(precision for _, precision in found) >= 0.99, found


def test_tiled_watermarks_are_distinguished_from_clean_photographs():
    pictures = list(real_images.photographs(1, 800))
    clean, tiled, single = (planted.repetitions(pictures, kind) for kind in (None, "tiled", "middle"))
    assert (tiled > 0.15).mean() >= 0.75 and (clean > 0.15).mean() <= 0.1
    assert np.median(single) < 0.08  # documented: it does not see what does not repeat
