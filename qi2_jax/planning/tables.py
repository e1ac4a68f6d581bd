"""Plans as tables: one column for each compiled program, and the whole stage."""

from collections.abc import Mapping, Sequence

from data_pipeline.funnel import Table
from qi2_jax.planning.compile import GIB
from qi2_jax.planning.programs import ProgramPlan
from qi2_jax.planning.stage import StagePlan

Rows = list[tuple[str, list[str]]]  # label, and one cell for each program


def of_stage(plan: StagePlan) -> Table:
    """The compiled programs of a stage."""
    programs = plan.compiled
    return _table(programs, _memory(plan), _arithmetic(plan), _collectives(programs), _bounds(plan))


def of_total(plan: StagePlan, given: float, price: float | None) -> Table:
    """The whole stage, at its bound and at a given utilisation.

    Args:
      plan: plan of the stage.
      given: share of the peak rate by all slots.
      price: price of a chip for an hour in USD; None: no cost.
    """
    compiled = f"{len(plan.programs)} of {len(plan.parts)} programs compiled"
    title = f"{plan.updates:,} updates of {plan.images:,.0f} images on average; {compiled}"
    columns = ("", "s per update", "images/s", "MFU of tokens", "days", "chip-hours", "USD")
    table = Table(title, columns, columns[1:])
    for name, utilisation in (("at the bound", None), (f"at {given:.0%} of the peak rate by slots", given)):
        days = plan.days(utilisation)
        seconds, hours = days * 86_400 / plan.updates, days * 24 * plan.chips
        mfu = plan.model_flops / (plan.chips * plan.peak * seconds)
        cost = f"{hours * price:,.0f}" if price else "-"
        cells = f"{seconds:.2f}", f"{plan.images / seconds:,.0f}", f"{mfu:.1%}", f"{days:.1f}", f"{hours:,.0f}", cost
        table.add_row(name, *cells)
    return table


def of_caching(programs: Sequence[ProgramPlan], weights: Mapping[str, int]) -> Table:
    """The compiled programs of a caching job.

    Args:
      programs: result of `plan_caching`.
      weights: bytes of a chip for each encoder.
    """
    rates = [f"{p.images / p.chips / p.bound.seconds:.1f}" for p in programs]
    return _table(
        programs,
        [("images or prompts per chip", [f"{p.images / p.chips:g}" for p in programs]), *_hbm(programs, weights)],
        _work(programs),
        _collectives(programs),
        [*_times(programs), ("images or prompts/s of a chip, at most", rates), _compilations(programs)],
    )


def _table(programs: Sequence[ProgramPlan], *sections: Rows) -> Table:
    """One column for each compiled program."""
    table = Table("Compiled programs", ["", *(program.name for program in programs)], [p.name for p in programs])
    for section in sections:
        for index, (label, cells) in enumerate(section):
            table.add_row(label, *cells, end_section=index == len(section) - 1)
    table.caption = "Times are lower bounds, and utilisations (MFU) upper bounds: real programs are slower."
    return table


def _memory(plan: StagePlan) -> Rows:
    programs = plan.compiled
    return [
        ("images per chip", [f"{p.images / p.chips:g}" if p.images else "-" for p in programs]),
        ("backward pass keeps", [p.keep or "-" for p in programs]),
        *([("tensor divides", [p.divided or "-" for p in programs])] if plan.mesh["tensor"] > 1 else []),
        *_hbm(programs, plan.state),
    ]


def _hbm(programs: Sequence[ProgramPlan], kept: Mapping[str, int]) -> Rows:
    """Memory of a chip: what a job keeps there, what a program adds, and the sum."""
    added = [(program.memory_total - sum(kept.values())) / GIB for program in programs]
    return [
        *((f"HBM GiB: {name}", [f"{size / GIB:.2f}"] * len(programs)) for name, size in kept.items()),
        ("HBM GiB: activations and code", [f"{size:.2f}" for size in added]),
        ("HBM GiB: total", [f"{p.memory_total / GIB:.2f} of {p.chip.hbm_bytes / GIB:.2f}" for p in programs]),
    ]


def _arithmetic(plan: StagePlan) -> Rows:
    programs, tera = plan.compiled, 1e12
    parts = [plan.parts[place] for place in plan.programs]
    tokens = [part.model_flops / plan.chips / tera for part in parts]
    slots = [part.slot_flops / plan.chips / tera for part in parts]
    ratios = [f"{p.compiled_ratio:.3f}" if p.compiled_ratio else "-" for p in programs]
    compiled, traffic = _work(programs)
    return [
        ("TFLOP of a chip: model, tokens", _padded([f"{flops:.2f}" for flops in tokens], programs)),
        ("TFLOP of a chip: model, slots", _padded([f"{flops:.2f}" for flops in slots], programs)),
        compiled,
        ("compiled / model of slots", ratios),
        traffic,
    ]


def _work(programs: Sequence[ProgramPlan]) -> Rows:
    return [
        ("TFLOP of a chip: compiled", [f"{p.analysis.flops / 1e12:.2f}" for p in programs]),
        ("HBM traffic GiB", [f"{p.analysis.hbm_bytes / GIB:.1f}" for p in programs]),
    ]


def _collectives(programs: Sequence[ProgramPlan]) -> Rows:
    found = [program.analysis.bytes_by() for program in programs]
    kinds = sorted({kind for sizes in found for kind in sizes}, key=lambda kind: -max(s.get(kind, 0) for s in found))
    rows = []
    for kind, axes in kinds:
        label = f"GiB received: {kind}" + (f" along {' x '.join(axes)}" if axes else "")
        rows.append((label, [f"{sizes.get((kind, axes), 0) / GIB:.3f}" for sizes in found]))
    return [*rows, ("overlapped with arithmetic", [f"{program.analysis.overlapped:.0%}" for program in programs])]


def _bounds(plan: StagePlan) -> Rows:
    programs = plan.compiled
    tokens = [
        f"{(program.slots_bound or 0) * plan.parts[place].model_flops / plan.parts[place].slot_flops:.1%}"
        for place, program in plan.programs.items()
    ]
    return [
        *_times(programs),
        ("MFU of slots, at most", [f"{p.slots_bound:.1%}" if p.slots_bound else "-" for p in programs]),
        ("MFU of tokens, at most", _padded(tokens, programs)),
        _compilations(programs),
    ]


def _compilations(programs: Sequence[ProgramPlan]) -> tuple[str, list[str]]:
    return "compiled in s", [f"{p.compile_seconds:.0f}" for p in programs]


def _times(programs: Sequence[ProgramPlan]) -> Rows:
    milli = lambda term: [f"{getattr(p.bound, term) * 1e3:.1f}" for p in programs]  # noqa: E731
    return [
        ("ms: arithmetic", milli("arithmetic")),
        ("ms: waiting for HBM", milli("memory")),
        ("ms: collectives that nothing overlaps", milli("exposed")),
        ("ms: all traffic of the busiest links", milli("links")),
        ("ms: bound", milli("seconds")),
        ("bound by", [p.bound.binding for p in programs]),
    ]


def _padded(cells: list[str], programs: list[ProgramPlan]) -> list[str]:
    return cells + ["-"] * (len(programs) - len(cells))
