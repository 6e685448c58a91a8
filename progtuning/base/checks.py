"""Checks of one value by one rule. Each raises InputError that says what was got and what was expected."""

from collections.abc import Collection

from progtuning.base.errors import InputError

INFINITY = float("inf")


def check_choice(name: str, value, choices: Collection[str]) -> None:
    """Raise InputError unless `value` is one of `choices`."""
    if value not in tuple(choices):  # of a mapping a list could not be looked up
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_choices(name: str, values: Collection[str], choices: Collection[str]) -> None:
    """Raise InputError unless `values` are one or more of `choices`."""
    if not values or not set(values) <= set(choices):
        wrong = ", ".join(sorted(set(values) - set(choices))) or "nothing"
        raise InputError(f"{name} must be among {', '.join(choices)}, got {wrong}")


def check_number(name: str, value, kind: type, low: float, high: float = INFINITY) -> None:
    """Raise InputError unless `value` is finite, in low..high, and an int; with `kind` float, an int or a float."""
    right_type = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right_type or not low <= value <= high or value == INFINITY:
        limit = f"in {low}..{high}" if high != INFINITY else f"of at least {low}"
        raise InputError(f"{name} must be {'an integer' if kind is int else 'a number'} {limit}, got {value!r}")
