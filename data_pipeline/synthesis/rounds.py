"""Makes as many records as were asked for: numbers that come to nothing are followed by further numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from data_pipeline.workers import in_order

_T = TypeVar("_T")
MOST_TRIED = 4  # numbers that are tried for every record that was asked for


@dataclass(frozen=True)
class _From(Generic[_T]):
    """A function of numbers that starts at `first`; worker processes receive a copy."""

    make: Callable[[int], _T]
    first: int

    def __call__(self, number: int) -> _T:
        return self.make(self.first + number)


def until_enough(
    make: Callable[[int], _T], count: int, workers: int, purpose: str, succeeded: Callable[[_T], bool]
) -> Iterator[tuple[int, _T]]:
    """Numbered results of `make`, in order, until `count` of them have succeeded or further numbers are hopeless.

    It gives up after a round in which nothing succeeds, and after `MOST_TRIED` numbers for every one asked for.

    Args:
      make: a pure function, sent to each process once per round.
      workers: number of processes; 1 means this process alone.
      purpose: what the processes are for, in the message of an error.

    Raises:
      ChildProcessError: if a worker process dies.
    """
    first, missing = 0, count
    while missing and first < MOST_TRIED * count:
        made = 0
        for number, result in enumerate(in_order(_From(make, first), missing, workers, purpose), start=first):
            made += succeeded(result)
            yield number, result
        first += missing
        missing -= made
        if not made:
            return


def shortfall(made: int, asked: int, reasons: dict[str, int]) -> str | None:
    """A message if fewer records were made than asked for, with the most frequent reasons; None otherwise."""
    if made >= asked:
        return None
    frequent = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    why = ", ".join(f"{reason} {count:,}" for reason, count in frequent)
    return f"made only {made:,} of {asked:,} records; most frequent reasons: {why or 'none'}"
