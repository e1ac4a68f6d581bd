"""The events of a run as tables, for its page."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from qi2_jax.reporting.formats import duration, is_number, moment
from qi2_jax.reporting.run_files import MAX_TEXT, ROUTINE

MAX_EVENTS = 200  # shown one by one
_SHOWN_APART = ("time", "event", "step", "seconds")  # in separate columns


@dataclass(frozen=True)
class Events:
    """Tables of events.

    Attributes:
      counts: for each kind: its name, number, total time, and first and last step.
      notable: events that are not routine, one by one; at most the last MAX_EVENTS.
      earlier: number of notable events that are left out; empty if all are shown.
    """

    counts: list[list[str]]
    notable: list[list[str]]
    earlier: str


def events_of(events: list[dict[str, Any]]) -> Events | None:
    if not events:
        return None
    kinds = Counter(str(event["event"]) for event in events).most_common()
    counts = [_count(kind, [event for event in events if str(event["event"]) == kind]) for kind, _ in kinds]
    notable = [event for event in events if event["event"] not in ROUTINE]
    earlier = len(notable) - MAX_EVENTS
    return Events(counts, [_line(event) for event in notable[-MAX_EVENTS:]], f"{earlier:,}" if earlier > 0 else "")


def facts_of(event: dict[str, Any], separator: str) -> str:
    """The values of an event, except its time, kind, step and duration."""
    facts = {key: value for key, value in event.items() if key not in _SHOWN_APART and value is not None}
    return separator.join(f"{key} {str(value)[:MAX_TEXT]}" for key, value in facts.items())


def _count(kind: str, events: list[dict[str, Any]]) -> list[str]:
    seconds = sum(event["seconds"] for event in events if is_number(event.get("seconds")))
    steps = [event["step"] for event in events if is_number(event.get("step"))]
    span = f"{min(steps):,} – {max(steps):,}" if steps else ""
    return [kind, f"{len(events):,}", duration(seconds) if seconds else "", span]


def _line(event: dict[str, Any]) -> list[str]:
    step = f"{event['step']:,}" if is_number(event.get("step")) else ""
    seconds = duration(event["seconds"]) if is_number(event.get("seconds")) else ""
    return [moment(event["time"]), str(event["event"]), step, seconds, facts_of(event, ", ")[:MAX_TEXT]]
