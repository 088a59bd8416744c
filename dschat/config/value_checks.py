"""Checks of single options. Each returns the problems found: none, or one sentence that names the flag and its value."""

import math

SEEDS = 2**32  # numpy takes no larger ones


def required(name: str, value: str) -> list[str]:
    """A problem where no model is named."""
    return [] if value else [f"{name} is required: a model folder or a hub id."]


def zero_stage(name: str, value: int) -> list[str]:
    """A problem where `value` is no ZeRO stage."""
    return [] if value in (0, 1, 2, 3) else [f"{name} {value}: ZeRO has the stages 0, 1, 2 and 3."]


def at_least(name: str, value, low) -> list[str]:
    """A problem unless `value` is finite and >= `low`."""
    return (
        []
        if value >= low and _is_finite(value)
        else [f"{name} {value}: must be {_finite(value)}at least {low}."]
    )


def above(name: str, value, low) -> list[str]:
    """A problem unless `value` is finite and > `low`."""
    return (
        []
        if value > low and _is_finite(value)
        else [f"{name} {value}: must be {_finite(value)}above {low}."]
    )


def in_range(name: str, value, low, high) -> list[str]:
    """A problem unless `low` <= `value` <= `high`."""
    return [] if low <= value <= high else [f"{name} {value}: must lie between {low} and {high}."]


def share(name: str, value: float, high: float) -> list[str]:
    """A problem unless 0 < `value` <= `high`."""
    return in_range(name, value, 0.0, high) or above(name, value, 0)


def seed_value(name: str, value: int) -> list[str]:
    """A problem where `value` is no seed."""
    return in_range(name, value, 0, SEEDS - 1)


def finite(name: str, value: float) -> list[str]:
    """A problem where `value` is an infinity or not a number."""
    return [] if _is_finite(value) else [f"{name} {value}: must be a finite number."]


def _is_finite(value) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # an int may be too large for a float


def _finite(value) -> str:
    return "" if _is_finite(value) else "a finite number, "
