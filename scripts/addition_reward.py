"""A verifiable task: sums after four solved ones. Holds the data and the reward function."""

import json
import random
import re
from pathlib import Path

LARGEST = 20


def reward(prompts: list[str], answers: list[str], *, target: list[int], **columns) -> list[float]:
    """Return 1 for each answer whose first number is `target`, else 0; for step 3's --reward_fn."""
    return [
        float(first_number(answer) == wanted)
        for answer, wanted in zip(answers, target, strict=True)
    ]


def first_number(text: str) -> int | None:
    """Return the first whole number of the first line, or None.

    The number may have a sign and thousands separators.
    """
    lines = text.strip().splitlines()
    if not lines:
        return None
    found = re.search(r"-?\d[\d,]*", lines[0])
    return int(found.group().replace(",", "")) if found else None


def write_data(
    folder: str | Path, *, num_train: int = 4000, num_eval: int = 256, seed: int = 1234
) -> Path:
    """Write train.jsonl and eval.jsonl with prompt and target, and return `folder`.

    A sum is an ordered pair (a, b) of numbers from 1 to 20. A fifth of the 400 sums is held out:
    these occur in the evaluation alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    sums = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    draw.shuffle(sums)
    num_held_out = len(sums) // 5
    held_out = sums[:num_held_out]
    trained = sums[num_held_out:]
    for name, pool, count in (("train", trained, num_train), ("eval", held_out, num_eval)):
        rows = []
        for _ in range(count):
            shots = [f"{a} + {b} = {a + b}\n" for a, b in draw.sample(trained, 4)]
            a, b = draw.choice(pool)
            rows.append({"prompt": "".join(shots) + f"{a} + {b} =", "target": a + b})
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder
