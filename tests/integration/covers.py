"""Choose few combinations of many options such that every two values meet."""

import itertools
import random
from collections.abc import Iterator


def product(axes: dict[str, tuple]) -> Iterator[dict]:
    """Return all combinations."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values))


def pairwise(axes: dict[str, tuple], *, tries: int = 50) -> list[dict]:
    """Return combinations that hold every pair of values of two axes; deterministic.

    Greedy: each is the best of `tries` random ones, all of which hold a pair that is still missing.
    """
    draw = random.Random(0)
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
    }
    found = []
    while missing:
        wanted = dict(min(missing, key=lambda pair: sorted(map(repr, pair))))
        candidates = [
            {name: wanted.get(name, draw.choice(axes[name])) for name in axes} for _ in range(tries)
        ]
        best = max(candidates, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        found.append(best)
    return found


def _pairs(row: dict) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
