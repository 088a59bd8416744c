"""A verifiable task: sums in words of digits, after four solved ones. Data, and the reward that checks an answer."""

import json
import random
import re
from pathlib import Path

LARGEST = 20


def reward(prompts: list[str], answers: list[str], *, target: list[int], **columns) -> list[float]:
    """1 for each answer whose first number is `target`, else 0: step 3's --reward_fn."""
    return [float(first_number(answer) == wanted) for answer, wanted in zip(answers, target)]


def first_number(text: str) -> int | None:
    """The first whole number of the first line, with a sign and thousands' commas, or None."""
    lines = text.strip().splitlines()
    found = re.search(r"-?\d[\d,]*", lines[0]) if lines else None
    return int(found.group().replace(",", "")) if found else None


def write_data(
    folder: str | Path, *, num_train: int = 4000, num_eval: int = 256, seed: int = 1234
) -> Path:
    """Write train.jsonl and eval.jsonl with prompt and target, and return `folder`; no held-out sum is trained.

    A sum is an ordered pair (a, b) of 1 to 20: a fifth of the 400 is held out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    sums = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    draw.shuffle(sums)
    held_out, trained = sums[: len(sums) // 5], sums[len(sums) // 5 :]
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
