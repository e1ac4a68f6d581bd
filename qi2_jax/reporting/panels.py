"""Which metrics share a chart, in which order, and the notes above them.

A metric needs no entry here: metrics without one are drawn as well, those with the same prefix together.
"""

import dataclasses
import re

from qi2_jax.reporting.charts import Line
from qi2_jax.reporting.curves import Curve

APART = 30.0  # largest ratio of neighbouring curves on one linear axis
SECTIONS = {
    "Loss": ("loss", "validation_loss", "loss_t"),
    "Optimisation": ("gradient_norm", "update_norm", "parameter_norm", "learning_rate", "skipped_total"),
    "Speed": (
        "images_per_second",
        "tokens_per_second",
        "slots_per_second",
        "model_tflops_per_second_per_chip",
        "mfu",
        "mfu_slots",
        "goodput",
        "time",
    ),
    "Memory": ("memory",),
    "Data": ("batch",),
}
OTHER = "Other"
NOTES = {
    "loss": "training, mean of each interval",
    "loss_t": "training, nine equal bins of shifted t (1 is noise)",
    "validation_loss": "EMA weights, mean over streams",
    "validation_loss/": "by stream: EMA solid, raw weights dashed",
    "validation_loss/ema_t": "EMA weights, at nine quantiles of the timestep distribution, shifted per image",
    "validation_loss/*_t": "one stream at nine quantiles, shifted per image: EMA solid, raw weights dashed",
    "gradient_norm": "before clipping",
    "gradient_norm/": "per parameter group, before clipping",
    "update_norm/": "per parameter group",
    "parameter_norm/": "per parameter group",
    "skipped_total": "steps with values that were not finite; they changed nothing",
    "slots_per_second": "with padding",
    "mfu": "share of the chips' bf16 peak: model operations of tokens",
    "mfu_slots": "share of the chips' bf16 peak: model operations of all slots, padding included",
    "goodput": "kept step time / wall time since the first start",
    "time/": "share of each interval",
    "time/seconds": "length of each interval",
    "memory/": "fullest device of process 0",
    "batch/": "composition of batches",
}
ALONE = ("time/seconds",)  # not in one chart with shares of time
TWINS = re.compile(r"(.+)/(ema|raw)(_t/.+)?/([^/]+)")  # a metric by EMA weights and by raw weights


@dataclasses.dataclass
class Panel:
    """The lines of one chart, with its title and a note."""

    title: str
    note: str
    lines: list[Line]


def sections(curves: dict[str, Curve]) -> dict[str, list[Panel]]:
    """Panels of each section, in the order of the page."""
    grouped: dict[str, dict[str, list[Line]]] = {}
    place = {prefix: (rank, section) for section, all_of in SECTIONS.items() for rank, prefix in enumerate(all_of)}
    for name in sorted(curves, key=lambda name: (place.get(name.partition("/")[0], (99, OTHER))[0], name)):
        section = place.get(name.partition("/")[0], (99, OTHER))[1]
        key, line = _place(name, curves[name])
        grouped.setdefault(section, {}).setdefault(key, []).append(line)
    result: dict[str, list[Panel]] = {}
    for section in (*SECTIONS, OTHER):
        for key, lines in grouped.get(section, {}).items():
            lines.sort(key=lambda line: line.color)  # EMA and raw weights next to each other
            name = key.rstrip("/")
            note = NOTES.get(key) or NOTES.get(name) or NOTES.get(name.rpartition("/")[0], "")
            panels = [Panel(f"{key}…" if key.endswith("/") else key, note, some) for some in _split(lines)]
            result.setdefault(section, []).extend(panels)
    return result


def _place(name: str, curve: Curve) -> tuple[str, Line]:
    """The line of a metric and the key of its panel: `a/` for `a/b`, and `a` for `a`."""
    if twin := TWINS.fullmatch(name):
        stem, which, stream, label = twin.groups()
        line = Line(f"{label} {which}", curve, label, dashed=which == "raw")
        return f"{stem}/*{stream}/" if stream else f"{stem}/", line
    prefix, slash, label = name.rpartition("/")
    if name in ALONE:
        return name, Line(name, curve, name)
    return prefix + slash or name, Line(label, curve, label)


def _split(lines: list[Line]) -> list[list[Line]]:
    """Splits curves that are too different for one linear axis over several charts."""
    sizes = {id(line): float(max(abs(line.curve.points[2]).max(), abs(line.curve.points[3]).max())) for line in lines}
    if all(line.curve.low > 0 for line in lines):  # their axis may be logarithmic
        return [lines]
    charts: list[list[Line]] = []
    before = 0.0
    for line in sorted(lines, key=lambda line: sizes[id(line)]):
        if not charts or (before > 0 and sizes[id(line)] > APART * before):
            charts.append([])
        charts[-1].append(line)
        before = sizes[id(line)]
    order = {id(line): rank for rank, line in enumerate(lines)}
    return [sorted(some, key=lambda line: order[id(line)]) for some in charts]
