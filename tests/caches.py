"""Caches of samples that tests and benchmarks make."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.funnel import Tally
from data_pipeline.samples import cache
from data_pipeline.samples.schema import Sample, Text


def write_cache(
    folder: Path,
    samples: Iterable[tuple[int, Sample] | tuple[int, Sample, bool]],
    empty: Text,
    fingerprint: dict[str, Any],
) -> None:
    """Writes a complete cache with one unit; arguments as in `cache.write_unit`."""
    cache.begin(folder, fingerprint)
    cache.write_unit(folder, 0, samples, Tally())
    cache.finish(folder, 1, empty)
