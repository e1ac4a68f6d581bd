"""The selection of a stage: which records it trains on."""

import pathlib

from data_pipeline.records.shards import RecordFolder
from data_pipeline.samples.cache import StreamKey, held_out_rule
from data_pipeline.samples.held_out import hold_out_of
from data_pipeline.selection.index import INDEX, read_selection, write_selection
from data_pipeline.selection.select import select
from qi2_jax.runs import paths
from qi2_jax.workflows.config import StageExperiment
from qi2_jax.workflows.reports import Show


def select_stage(stage: StageExperiment, records: pathlib.Path, out: pathlib.Path, show: Show) -> None:
    """Selects the records of a stage; an existing selection is reused.

    Args:
      stage: config of the stage.
      records: folder of scored records.
      out: folder of the stage, which receives the selection.
      show: function that draws the report of a new selection.

    Raises:
      ValueError: if the selection has no records for a stream to which the config's mixture gives steps.
    """
    index = out / INDEX
    if not index.is_file():
        selection = select(records, stage.data.thresholds)
        show(selection.table())
        out.mkdir(parents=True, exist_ok=True)
        write_selection(index, selection)
    rule = held_out_rule(sorted(out.parent.glob(f"*/{paths.SAMPLES}")))
    if missing := _missing_streams(stage, records, index, rule):
        raise ValueError(
            f"{index} has nothing for {sorted(map(str, missing))} (side-conditions, held out for validation), to which "
            f"data.mixture gives steps; give these no share, add such records, or change data.held_out "
            f"({stage.data.held_out})"
        )


def _missing_streams(
    stage: StageExperiment, records: pathlib.Path, index: pathlib.Path, rule: str | None
) -> set[StreamKey]:
    """The streams that have a share of the steps, or are needed for validation, and no record."""
    held_out = stage.data.held_out
    missing = set(stage.data.shares.weights())
    missing |= {key._replace(held=True) for key in missing if held_out}
    hold_out = hold_out_of(RecordFolder(records), held_out, rule)
    for row in read_selection(index):
        if not missing:
            break
        if not row.captions:  # encoding leaves it out
            continue
        fits = stage.data.resolutions.fits(row.width, row.height)
        keys = {StreamKey(side, row.conditions) for side, fit in fits if fit.left_out is None}
        if missing & {*keys, *(key._replace(held=True) for key in keys)}:  # else its images need not be read
            held = hold_out.holds(row.index)
            missing -= {key._replace(held=held) for key in keys}
    return missing
