"""Percentiles cut each language and class separately, whatever the level of its scores."""

import numpy as np
import pytest

from data_pipeline.selection import percentiles
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds


def rows(scored=True):
    """Forty pairs of two classes and two languages, with scores on four levels, and an edit far below them."""
    rng = np.random.default_rng(0)
    for index in range(40):
        tags, level = (["design/slide"], 0.1) if index % 2 else ([], 0.5)
        languages = ["en", "ja"][: 1 + index % 3 % 2]
        cosines = [level + place / 5 + rng.uniform(0, 0.05) for place in range(len(languages))] if scored else None
        score = 10 * level + rng.uniform() if scored else None
        yield row(tags, languages, cosines, score)
    yield row(["edit/local"], ["en"], [-1.0] if scored else None, 9.0 if scored else None, conditions=1)


def row(tags, languages, cosines, score, conditions=0):
    described = {"tags": tags, "languages": languages, "conditions": conditions}
    return {f"description.{k}": v for k, v in described.items()} | {
        "alignment.cosines": cosines,
        "aesthetic.score": score,
    }


def test_each_group_loses_its_own_lowest(monkeypatch):
    monkeypatch.setattr(percentiles, "read_scores", lambda folder, filters: rows())
    cuts = percentiles.find_cuts("any", 25, 50)
    assert set(cuts.alignment) == {(language, kind) for language in ("en", "ja") for kind in (None, "design")}
    assert set(cuts.aesthetic) == {(None,), ("design",), ("edit",)}
    for (language, kind), cut in cuts.alignment.items():
        own = [
            cosine
            for found in rows()
            if percentiles.class_of(found) == kind
            for name, cosine in zip(found["description.languages"], found["alignment.cosines"], strict=True)
            if name == language
        ]
        assert np.mean(np.array(own) < cut) == pytest.approx(0.25, abs=0.1)
    assert cuts.alignment["en", "design"] < 0.2 < 0.5 < cuts.alignment["en", None] < cuts.alignment["ja", None]
    assert percentiles.find_cuts("any", 0, 0) == percentiles.Cuts({}, {})


def test_requested_scores_must_exist(monkeypatch, demo):
    monkeypatch.setattr(percentiles, "read_scores", lambda folder, filters: rows(scored=False))
    with pytest.raises(ValueError, match="min_aesthetic_percentile is 10, but aesthetic was not scored"):
        select(demo[2], Thresholds(min_aesthetic_percentile=10))
