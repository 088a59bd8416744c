"""A toy data set, made offline, for the miniature models: short remarks that end well or badly."""

import json
import random
from pathlib import Path

SUBJECTS = ("the film", "the plot", "the cast", "the score", "the end", "the script")
VERBS = ("is", "was", "seems", "stays")
GOOD = ("good", "great", "fine", "lovely", "superb", "warm")
BAD = ("bad", "dull", "poor", "awful", "weak", "cold")


def write_toy_data(
    folder: str | Path, *, num_train: int = 256, num_eval: int = 64, seed: int = 1234
) -> Path:
    """Write train.jsonl and eval.jsonl with prompt, chosen and rejected, and return `folder`.

    The same arguments give the same files. A good word is preferred to a bad one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for name, count in (("train", num_train), ("eval", num_eval)):
        rows = (
            {
                "prompt": f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)}",
                "chosen": f" {draw.choice(GOOD)}",
                "rejected": f" {draw.choice(BAD)}",
            }
            for _ in range(count)
        )
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder
