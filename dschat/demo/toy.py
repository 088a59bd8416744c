"""A toy data set for the miniature models, made offline: short remarks with a good or bad word."""

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

    The same arguments give the same files. The chosen answer is a good word and the rejected one a
    bad word. No prompt is in both files: a training row whose prompt is also in the evaluation
    would be left out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    train_prompts, eval_prompts = _split_prompts()
    parts = (("train", num_train, train_prompts), ("eval", num_eval, eval_prompts))
    for name, count, prompts in parts:
        rows = (
            {
                "prompt": draw.choice(prompts),
                "chosen": f" {draw.choice(GOOD)}",
                "rejected": f" {draw.choice(BAD)}",
            }
            for _ in range(count)
        )
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return folder


def _split_prompts() -> tuple[list[str], list[str]]:
    """Return the prompts for training and for evaluation; each word is in both."""
    train: list[str] = []
    evaluation: list[str] = []
    for i, subject in enumerate(SUBJECTS):
        for j, verb in enumerate(VERBS):
            part = evaluation if j == i % len(VERBS) else train
            part.append(f"{subject} {verb}")
    return train, evaluation
