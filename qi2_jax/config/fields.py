"""Declarations of config dataclasses about their fields, and range checks that these dataclasses share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_CHANGEABLE, _CHOICES, _TYPED = "changeable", "choices", "typed"


def changeable(**options: Any) -> Any:
    """A field that may change, with everything below it, when a run or job continues.

    Such a field decides how long a run trains, what it reports, saves or draws, on which devices and in which
    microbatches it computes, or how a new run starts. An update that both configs compute is the same up to rounding.

    Args:
      options: arguments of `dataclasses.field`, such as `default`.
    """
    return dataclasses.field(metadata={_CHANGEABLE: True}, **options)


def fixed(**options: Any) -> Any:
    """A group whose keys may not change when a job continues, whatever the group itself declares."""
    return dataclasses.field(metadata={_CHANGEABLE: False}, **options)


def choice(table: Mapping[str, Any], **options: Any) -> Any:
    """A field that names an entry of a table and receives that entry.

    If the entry is a dataclass, the group may also have a key with the entry's name and its arguments:
    `law="uniform"` beside `uniform=dict(low=0.0, high=1.0)` becomes `Uniform(0.0, 1.0)`.

    Args:
      table: names and their entries.
      options: arguments of `dataclasses.field`.
    """
    return dataclasses.field(metadata={_CHOICES: table}, **options)


def as_typed() -> Any:
    """A field that receives the plain JSON from which its dataclass was parsed, for the record of a run or job."""
    return dataclasses.field(default_factory=dict, compare=False, repr=False, metadata={_TYPED: True})


def declares_changeable(field: dataclasses.Field) -> bool | None:
    """Whether the field is changeable or fixed; None if it leaves that to the fields below it."""
    return field.metadata.get(_CHANGEABLE)


def choices_of(field: dataclasses.Field) -> Mapping[str, Any] | None:
    """The table of a field made by `choice`, else None."""
    return field.metadata.get(_CHOICES)


def is_as_typed(field: dataclasses.Field) -> bool:
    """Whether the field was made by `as_typed`."""
    return _TYPED in field.metadata


def check_at_least(config: Any, **minimums: float) -> None:
    """Raises a ValueError that names the first field below its minimum, as `check_at_least(self, steps=1)`."""
    for name, minimum in minimums.items():
        if not getattr(config, name) >= minimum:  # also NaN
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {minimum}")


def check_one_of(config: Any, name: str, choices: Any) -> None:
    """Raises a ValueError if a field has a value other than these."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name} is {getattr(config, name)!r}; choose one of {sorted(choices)}")
