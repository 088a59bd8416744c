"""A verifiable task: sums and word problems of two operations, made from a grammar.

Holds the data and the reward function of reproduce_verifiable.py. An answer shows its work and ends
with the result after a mark, as in GSM8K (Cobbe et al. 2021): "12 + 7 = 19. 19 - 4 = 15. #### 15".
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Ida", "Leo", "Mia")
THINGS = ("nuts", "coins", "books", "cards", "eggs", "pens", "figs", "keys")
# The operations of a word problem, and its text.
WORD_PROBLEMS = (
    ("+", "+", "{name} has {a} {things}. {name} finds {b} and buys {c} more."),
    ("+", "-", "{name} has {a} {things}. {name} buys {b} more and loses {c}."),
    ("-", "+", "{name} has {a} {things}. {name} sells {b} and then finds {c}."),
    ("-", "-", "{name} has {a} {things}. {name} loses {b} and sells {c}."),
    ("*", "+", "{name} has {a} boxes with {b} {things} each, and {c} more {things}."),
    ("*", "-", "{name} has {a} boxes with {b} {things} each, and loses {c}."),
)
SUMS = ("What is {sum}?", "{name} needs {sum}.", "{name} asks for {sum}.", "{name} finds {sum}.")
QUESTION = " How many {things} does {name} have?"
PROMPT = "Question: {question}\nAnswer:"
RESULT = re.compile(r"####\s*(-?\d+)\s*\Z")
HELD_OUT = 5  # one problem in so many is held out
MOST_DRAWS = 500  # for each row, before the grammar counts as exhausted


@dataclass(frozen=True)
class Problem:
    """A problem with its solution."""

    kind: str  # "sum" or "word"
    prompt: str
    steps: tuple[str, ...]  # "12 + 7 = 19", ...
    result: int

    def solution(self, *, with_steps: bool, with_mark: bool = True) -> str:
        """Return the answer, which begins with a space; without the mark it earns no reward."""
        work = "".join(f" {step}." for step in self.steps) if with_steps else ""
        return f"{work} #### {self.result}" if with_mark else f"{work} {self.result}"


def reward(prompts: list[str], answers: list[str], *, result: list[int], **columns) -> list[float]:
    """Return 1 for each answer that ends with "#### " and the right result, else 0.

    For step 3's --reward_fn. The mark must occur once, and nothing may come after the result.
    """
    return [
        float(found_result(answer) == wanted)
        for answer, wanted in zip(answers, result, strict=True)
    ]


def found_result(answer: str) -> int | None:
    """Return the result that an answer ends with, or None if its format is wrong."""
    found = RESULT.search(answer)
    if found is None or answer.count("####") != 1:
        return None
    return int(found[1])


def kind_of(prompt: str) -> str:
    """Return the kind of the problem that a prompt states."""
    return "word" if "How many" in prompt else "sum"


def write_data(
    folder: str | Path,
    *,
    num_train: int,
    num_eval: int,
    largest: int,
    sum_share: float,
    with_steps: bool,
    unmarked_share: float,
    seed: int,
) -> Path:
    """Write train.jsonl and eval.jsonl with prompt, response, result and kind; return `folder`.

    The same arguments give the same files. The evaluation has distinct problems. If the answers
    show their steps, the calculations of the evaluation occur in no training row. Otherwise only
    its texts are new.

    Args:
        folder: the folder to write.
        num_train: rows of train.jsonl.
        num_eval: rows of eval.jsonl.
        largest: the largest number in a problem.
        sum_share: share of the problems that are sums or differences of two numbers.
        with_steps: whether the answers show the calculations.
        unmarked_share: share of the answers without the mark, so that its use has to be learned.
        seed: of the problems.

    Raises:
        ValueError: the grammar has fewer problems.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for held_out, name, count in ((False, "train", num_train), (True, "eval", num_eval)):
        draw = random.Random(f"{name} {seed}")
        rows: dict[object, dict] = {}
        for _ in range(MOST_DRAWS * count):
            if len(rows) == count:
                break
            problem = _sum(draw, largest) if draw.random() < sum_share else _word(draw, largest)
            drawn = " ".join(problem.steps) if with_steps else problem.prompt
            if problem.result < 0 or is_held_out(drawn) != held_out:
                continue
            key = problem.prompt if held_out else len(rows)
            with_mark = draw.random() >= unmarked_share
            rows[key] = {
                "prompt": problem.prompt,
                "response": problem.solution(with_steps=with_steps, with_mark=with_mark),
                "result": problem.result,
                "kind": problem.kind,
            }
        if len(rows) < count:
            raise ValueError(f"the grammar has only {len(rows)} problems for {name}.jsonl")
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def is_held_out(text: str) -> bool:
    """Return whether a problem is held out for the evaluation; one in `HELD_OUT` is."""
    return random.Random(text).randrange(HELD_OUT) == 0


def _sum(draw: random.Random, largest: int) -> Problem:
    a, b = draw.randint(1, largest), draw.randint(1, largest)
    step, result = _calculate(a, draw.choice("+-"), b)
    question = draw.choice(SUMS).format(sum=step.partition(" =")[0], name=draw.choice(NAMES))
    return Problem("sum", PROMPT.format(question=question), (step,), result)


def _word(draw: random.Random, largest: int) -> Problem:
    first, second, text = draw.choice(WORD_PROBLEMS)
    words = {"name": draw.choice(NAMES), "things": draw.choice(THINGS)}
    a, b, c = (draw.randint(1, largest) for _ in range(3))
    if first == "*":  # keep products about as large as sums
        a, b = min(a, 2 + a % 3), min(b, 2 + b % 8)
    one, between = _calculate(a, first, b)
    two, result = _calculate(between, second, c)
    question = (text + QUESTION).format(a=a, b=b, c=c, **words)
    result = result if between >= 0 else -1  # nobody has fewer than none
    return Problem("word", PROMPT.format(question=question), (one, two), result)


def _calculate(a: int, operation: str, b: int) -> tuple[str, int]:
    """Return the calculation as text, and its result."""
    result = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return f"{a} {operation} {b} = {result}", result
