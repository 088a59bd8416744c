"""Checks of single options. Each returns the problems found: none, or one sentence that names the flag and its value."""


def required(name: str, value: str) -> list[str]:
    """A problem where no model is named."""
    return [] if value else [f"{name} is required: a model folder or a hub id."]


def zero_stage(name: str, value: int) -> list[str]:
    """A problem where `value` is no ZeRO stage."""
    return [] if value in (0, 1, 2, 3) else [f"{name} {value}: ZeRO has the stages 0, 1, 2 and 3."]


def at_least(name: str, value, low) -> list[str]:
    """A problem unless `value` >= `low`."""
    return [] if value >= low else [f"{name} {value}: must be at least {low}."]


def above(name: str, value, low) -> list[str]:
    """A problem unless `value` > `low`."""
    return [] if value > low else [f"{name} {value}: must be above {low}."]


def in_range(name: str, value, low, high) -> list[str]:
    """A problem unless `low` <= `value` <= `high`."""
    return [] if low <= value <= high else [f"{name} {value}: must lie between {low} and {high}."]
