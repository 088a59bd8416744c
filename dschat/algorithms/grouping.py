"""Rows of like length in one micro-batch, so that little of it is padding."""

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], *, tokens: int, least: int = 1) -> list[list[int]]:
    """Divide rows into groups of like length.

    Rows are taken from the longest to the shortest. A group is full if one more row would bring its
    rows, times the width that they are padded to, above `tokens`.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a group, with padding; a single row may have more.
        least: the fewest groups, at most the number of rows.

    Returns:
        The indices of each group's rows, the longest first.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    while len(groups) < least:
        widest = max((g for g in groups if len(g) > 1), key=lambda g: padded_tokens(g, lengths))
        place = groups.index(widest)
        half = len(widest) // 2
        groups[place : place + 1] = [widest[:half], widest[half:]]
    return groups


def padded_tokens(rows: Sequence[int], lengths: Sequence[int]) -> int:
    """Return the tokens of a group of rows, with padding."""
    return len(rows) * max(lengths[row] for row in rows)
