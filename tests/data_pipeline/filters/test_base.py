"""A filter's declarations alone decide what is dropped."""

import pickle
from types import SimpleNamespace

import pytest

from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.filters.base import Exemption, Filter, Threshold

SMALL = Exemption("small ones", lambda row, chosen: row["size.side"] < chosen.min_small)
FILTER = Filter(
    name="size",
    version=1,
    columns={"side": (int, "pixels"), "weight": (float, "kilograms")},
    score=lambda candidates: [],
    thresholds=(
        Threshold("max_side", 10, "pixels", low=1, high=99, column="side", keeps="below", reason="too_large"),
        Threshold("min_weight", 2.0, "kilograms", low=0, high=9, column="weight", reason="too_light", exempt=(SMALL,)),
        Threshold("min_small", 3, "pixels from which the weight counts", low=0, high=9),
    ),
)


@pytest.mark.parametrize(
    ("side", "weight", "reason"),
    [
        (10, 2.0, None),
        (11, 2.0, "too_large"),
        (11, 1.0, "too_large"),
        (5, 1.9, "too_light"),
        (2, 1.0, None),
        (5, None, None),
    ],
)
def test_thresholds_drop_by_their_declaration(side, weight, reason):
    chosen = SimpleNamespace(max_side=10, min_weight=2.0, min_small=3)
    assert FILTER.reason({"size.side": side, "size.weight": weight}, chosen) == reason


def test_declarations_are_complete_and_filters_travel_to_other_processes():
    for filter in (*CASCADE, *TRIALS):
        assert pickle.loads(pickle.dumps(filter)).name == filter.name
        for one in filter.thresholds:
            assert one.column is None or one.column in filter.columns
            drops_by_rule = filter.drops is not None or filter.drops_caption is not None
            assert one.reason or one.column is None or drops_by_rule, one.name
    names = [one.name for filter in (*CASCADE, *TRIALS) for one in filter.thresholds]
    assert len(names) == len(set(names))
