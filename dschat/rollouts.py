"""Show the answers that a run of step 3 has kept with --save_rollouts.

python -m dschat.rollouts output/ppo                   # a table of all rollouts, and the last one
python -m dschat.rollouts output/ppo --rollout 12 --sort score --reverse --limit 5
python -m dschat.rollouts output/ppo --contains "as an AI" --limit 0
python -m dschat.rollouts output/ppo --compare 4 40        # side by side, and prompts in both
python -m dschat.rollouts output/ppo/evaluation            # held-out answers, in the same way
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dschat.runtime.paths import user_path
from dschat.runtime.text import escape_controls
from dschat.tracking.table import table

FOLDER = "rollouts"
Row = dict[str, Any]  # one answer: prompt, answer, score, length, ended, and more
SORTS = ("score", "length", "kl")
# Numbers of an answer, in the order in which they are shown.
NUMBERS = ("score", "reward", "advantage", "kl", "length", "logprob", "ref_logprob")


def main(argv: list[str] | None = None) -> None:
    """Print the rollouts that the flags ask for."""
    args = parse(argv)
    files = rollout_files(user_path(args.folder))
    if args.compare:
        print(comparison(files, *args.compare, contains=args.contains, limit=args.limit))
        return
    number = max(files) if args.rollout is None else args.rollout
    rows = read_rows(files, number)
    if args.rollout is None:
        print(rollout_table({number: read_rows(files, number) for number in files}))
        print()
    chosen = select(rows, contains=args.contains, sort=args.sort, reverse=args.reverse)
    shown = chosen[: args.limit or None]
    print(f"rollout {number}: {len(shown)} of {len(rows)} answers")
    for row in shown:
        print(f"\n{answer_text(row)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m dschat.rollouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="--output_dir of step 3, or a folder of rollout_N.jsonl"
    )
    parser.add_argument("--rollout", type=int, metavar="K", help="show this one; default: the last")
    parser.add_argument("--sort", choices=SORTS, help="order of the answers, smallest first")
    parser.add_argument("--reverse", action="store_true", help="reverse the order")
    parser.add_argument(
        "--contains", metavar="TEXT", help="only answers with TEXT in the prompt or the answer"
    )
    parser.add_argument(
        "--limit", type=int, default=10, metavar="N", help="answers to show; default 10, 0: all"
    )
    parser.add_argument(
        "--compare", type=int, nargs=2, metavar=("K1", "K2"), help="compare two rollouts"
    )
    args = parser.parse_args(argv)
    if args.limit < 0:
        parser.error("--limit: give 0 (all) or more")
    if args.compare and (args.rollout is not None or args.sort or args.reverse):
        parser.error("--compare shows two rollouts: leave out --rollout, --sort and --reverse")
    return args


def rollout_files(folder: Path) -> dict[int, Path]:
    """Return the files of kept rollouts by number, in order.

    Raises:
        ValueError: there are none.
    """
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    found = {}
    for path in sorted(folder.glob("rollout_*.jsonl")):
        number = path.stem.removeprefix("rollout_")
        if number.isdecimal():
            found[int(number)] = path
    if not found:
        raise ValueError(
            f"{folder}: no rollout_N.jsonl. Give the --output_dir of a run of step 3 with "
            "--save_rollouts, or a folder of such files."
        )
    return found


def read_rows(files: dict[int, Path], number: int) -> list[Row]:
    """Return the answers of a rollout, each with its KL if both logprobs are known.

    Raises:
        ValueError: the rollout was not kept, or its file is damaged.
    """
    if number not in files:
        kept = ", ".join(map(str, files))
        raise ValueError(f"rollout {number} was not kept. Kept are: {kept}.")
    rows = []
    lines = files[number].read_text(encoding="utf-8").split("\n")
    for line_number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            row["prompt"], row["answer"], row["score"], row["length"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{files[number]}:{line_number}: not an answer with prompt, answer, score and "
                "length. Delete the file, or restore it."
            ) from error
        if "ref_logprob" in row:
            row["kl"] = row["logprob"] - row["ref_logprob"]
        rows.append(row)
    return rows


def select(
    rows: list[Row], *, contains: str | None, sort: str | None = None, reverse: bool = False
) -> list[Row]:
    """Return the rows that contain a text, in order.

    Args:
        rows: the answers of a rollout.
        contains: a part of the prompt or of the answer; None: all rows.
        sort: the number to sort by, smallest first; None: as in the file.
        reverse: whether to reverse the order.

    Raises:
        ValueError: the rows lack the number to sort by.
    """
    if contains is not None:
        rows = [row for row in rows if contains in row["prompt"] or contains in row["answer"]]
    if sort is not None:
        if any(sort not in row for row in rows):
            raise ValueError(f"--sort {sort}: this run had no reference model (--kl_coef 0).")
        rows = sorted(rows, key=lambda row: row[sort])
    return rows[::-1] if reverse else rows


def rollout_table(rollouts: dict[int, list[Row]]) -> str:
    """Return a table of the means of each rollout."""
    rows = [[str(number), *summary(rows).values()] for number, rows in rollouts.items()]
    return table(rows, header=["rollout", *summary([])])


def summary(rows: list[Row]) -> dict[str, str]:
    """Return the number of answers and their means, as text; "" if a number is missing."""
    shown = {"answers": str(len(rows))}
    for name in ("score", "reward", "kl", "length", "ended"):
        known = [float(row[name]) for row in rows if name in row]
        shown[name] = f"{sum(known) / len(known):.3f}" if known else ""
    return shown


def answer_text(row: Row) -> str:
    """Return an answer with its prompt and numbers, without control characters."""
    numbers = [f"{name} {row[name]:.4g}" for name in NUMBERS if name in row]
    end = "ended" if row.get("ended", True) else "truncated"
    return "\n".join(
        [
            "  ".join([*numbers, end]),
            f"prompt: {escape_controls(row['prompt'].strip())}",
            f"answer: {escape_controls(row['answer'].strip())}",
        ]
    )


def comparison(
    files: dict[int, Path], first: int, second: int, *, contains: str | None, limit: int
) -> str:
    """Return the means of two rollouts, and the answers to the prompts that both have.

    Args:
        files: from ``rollout_files``.
        first: a rollout.
        second: another.
        contains: as for ``select``.
        limit: most prompts to show; 0: all.
    """
    rollouts = {
        number: select(read_rows(files, number), contains=contains) for number in (first, second)
    }
    parts = [rollout_table(rollouts)]
    prompts = [row["prompt"] for row in rollouts[first]]
    others = {row["prompt"] for row in rollouts[second]}
    common = [prompt for prompt in dict.fromkeys(prompts) if prompt in others]
    shown = common[: limit or None]
    parts.append(f"{len(shown)} of {len(common)} prompts in both")
    for prompt in shown:
        lines = [f"prompt: {escape_controls(prompt.strip())}"]
        for number, rows in rollouts.items():
            for row in rows:
                if row["prompt"] == prompt:
                    answer = escape_controls(row["answer"].strip())
                    lines.append(f"rollout {number}, score {row['score']:.4g}: {answer}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
