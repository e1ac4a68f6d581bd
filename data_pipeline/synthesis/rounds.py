"""Generates the requested number of records: failed numbers are replaced by further numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from data_pipeline.workers import in_order

_T = TypeVar("_T")
MAX_TRIES_PER_RECORD = 4  # numbers that are tried per requested record


@dataclass(frozen=True)
class _Shifted(Generic[_T]):
    """A function of numbers that starts at `first`; worker processes receive a copy."""

    make: Callable[[int], _T]
    first: int

    def __call__(self, number: int) -> _T:
        return self.make(self.first + number)


def until_enough(
    make: Callable[[int], _T], count: int, workers: int, purpose: str, succeeded: Callable[[_T], bool]
) -> Iterator[tuple[int, _T]]:
    """Yields numbered results of `make`, in order, until `count` of them have succeeded.

    It gives up after a round without success, and after `MAX_TRIES_PER_RECORD * count` numbers.

    Args:
      make: pure function; it is sent to each process once per round.
      count: number of successes.
      workers: number of processes; 1 means this process alone.
      purpose: purpose of the processes, for error messages.
      succeeded: function that returns whether a result counts.

    Raises:
      ChildProcessError: if a worker process dies.
    """
    first, missing = 0, count
    while missing and first < MAX_TRIES_PER_RECORD * count:
        successes = 0
        for number, result in enumerate(in_order(_Shifted(make, first), missing, workers, purpose), start=first):
            successes += succeeded(result)
            yield number, result
        first += missing
        missing -= successes
        if not successes:
            return


def shortfall(made: int, asked: int, reasons: dict[str, int]) -> str | None:
    """A message with the most frequent reasons if fewer records were made than asked for; None otherwise."""
    if made >= asked:
        return None
    frequent = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
    why = ", ".join(f"{reason} {count:,}" for reason, count in frequent)
    return f"made only {made:,} of {asked:,} records; most frequent reasons: {why or 'none'}"
