"""Show what each step would read and learn.

``python -m dschat.data.inspect --data_path rows.jsonl --model folder``
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dschat.config.group_checks import data_problems
from dschat.config.options import flag
from dschat.config.parse import parse_config
from dschat.config.sft import SFTData
from dschat.config.value_checks import fields_at_least
from dschat.data.blends import epoch_draws, open_blends
from dschat.data.datasets import PairDataset, PromptDataset, SFTDataset, TextDataset
from dschat.data.preparation import Report
from dschat.data.sources import Part, Source
from dschat.data.splits import Blend
from dschat.data.survey import (
    SAMPLE_ROWS,
    Example,
    Survey,
    count_learned,
    find_bad_rows,
    learned_mask,
    percentile,
    survey_columns,
    survey_rows,
)
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime.log import run_main
from dschat.runtime.text import escape_controls

# The title of each step, and the text that its rows need.
STEPS = {
    1: ("supervised fine-tuning", "chosen"),
    2: ("reward model and DPO", "rejected"),
    3: ("PPO", "prompt"),
}
FAULTS_SHOWN = 10
LABEL_WIDTH = 11
GREEN = 32
RED = 31

# Parts of a text, and the colour of those that are learned.
Segments = Sequence[tuple[str, int | None]]


@dataclass(frozen=True)
class InspectOptions:
    """Options of this program: the tokenizer, and how much to show."""

    model: str = field(metadata={"help": "Folder or hub name of the tokenizer."})
    step: int = flag(0, "Step to inspect: 1, 2 (also DPO) or 3; 0: all.")
    max_prompt_seq_len: int = flag(256, "Longest prompt of step 3 in tokens; see --truncation.")
    num_shown: int = flag(2, "Rows to show of each data set in each step.")
    color: Literal["auto", "always", "never"] = flag(
        "auto",
        "Show what is learned in colour, or between « and »; auto: colour on a terminal, unless "
        "the environment variable NO_COLOR is set.",
    )
    add_eot_token: bool = flag(
        False, "Add --eot_token as a special token and end every answer with it."
    )
    eot_token: str = flag("<|endoftext|>", "The end-of-text token that --add_eot_token adds.")
    trust_remote_code: bool = flag(False, "Run code from the tokenizer's folder or hub repository.")

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = fields_at_least(self, ("num_shown",), 0)
        found += fields_at_least(self, ("max_prompt_seq_len",), 1)
        if self.step not in (0, *STEPS):
            found.append(f"--step {self.step}: give 1, 2 or 3, or 0 for all steps.")
        return found


@dataclass(frozen=True)
class InspectConfig:
    """Inspection of the data of each step."""

    data: SFTData
    options: InspectOptions

    def problems(self) -> list[str]:
        """Return everything that is wrong with the options, one sentence each."""
        return data_problems(self.data) + fields_at_least(self.data, ("max_seq_len",), 2)


def main(argv: list[str] | None = None) -> None:
    """Print what each step reads of each data set, and some rows as the model sees them.

    Raises:
        ValueError: every step that is inspected would stop; the first reason.
    """
    config = parse_config(InspectConfig, argv)
    options = config.options
    tokenizer = load_tokenizer(
        options.model,
        add_eot_token=options.add_eot_token,
        eot_token=options.eot_token,
        trust_remote_code=options.trust_remote_code,
        flag="--model",
    )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may know fewer characters
    inspection = _Inspection(config, tokenizer)
    steps = [options.step] if options.step else list(STEPS)
    failures = []
    try:
        # This program prints what these would log.
        with (
            _quiet("dschat.data.blends", logging.WARNING),
            _quiet("dschat.data.sources", logging.ERROR),
        ):
            for step in steps:
                failures += inspection.show_step(step)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if len(failures) == len(steps):
        raise failures[0]


class _Inspection:
    """Prints what each step reads.

    Args:
        config: of this program.
        tokenizer: of the model.
    """

    def __init__(self, config: InspectConfig, tokenizer: PreTrainedTokenizerBase):
        self.data = config.data
        self.options = config.options
        self.tokenizer = tokenizer
        self.color = _use_color(config.options.color)
        self.listed: dict[str, int] = {}  # the step in which a source's bad rows are listed

    def show_step(self, step: int) -> list[ValueError]:
        """Print all of one step; return the error that would stop it, if there is one."""
        title = f"step {step}, {STEPS[step][0]}"
        try:
            blends, stop = self._open(step)
        except ValueError as error:
            print(f"{title}: nothing to read: {error}\n")
            return [error]
        train, held_out = blends
        print(f"{title}: {len(train)} rows to train on, {len(held_out)} held out\n")
        kept = []
        reports = []
        for (source, train_part), (_, eval_part) in zip(train.pieces, held_out.pieces, strict=True):
            surveys = self._show_source(step, source, train_part, eval_part)
            kept.append(len(surveys[0].report.kept))
            reports.append([survey.report for survey in surveys])
        stop = stop or self._prepared_error(reports) or self._show_draws(train, kept)
        if stop:
            lines = str(stop).splitlines()
            reason = f": {lines[0]}" if len(lines) == 1 else f" at bad rows. {lines[-1]}"
            print(f"step {step} would stop{reason}\n")
        return [stop] if stop else []

    def _open(self, step: int) -> tuple[tuple[Blend, Blend], ValueError | None]:
        """Open the rows of a step without the bad ones.

        Returns:
            Training and evaluation rows, and the error that opening them with the bad ones raises.

        Raises:
            ValueError: no rows can be read.
        """
        whole = self.data.sft_only_data_path if step == 1 else ()
        options: dict[str, Any] = dict(step=step, needs=STEPS[step][1], whole=whole)
        try:
            return open_blends(self.data, **options), None
        except ValueError as error:
            if self.data.skip_bad_rows:
                raise
            try:
                with _quiet("dschat.data.blends", logging.ERROR):
                    return open_blends(replace(self.data, skip_bad_rows=True), **options), error
            except ValueError:
                raise error from None

    def _prepared_error(self, reports: Sequence[Sequence[Report]]) -> ValueError | None:
        """Return the error of rows that cannot be shown, or of a part of which none is left."""
        for name, part in zip(("training", "evaluation"), zip(*reports, strict=True), strict=True):
            num_faults = sum(report.num_faults for report in part)
            if num_faults and not self.data.skip_bad_rows:
                return ValueError(
                    f"{num_faults} rows of the {name} data cannot be shown. Fix them, or leave "
                    "them out with --skip_bad_rows."
                )
            if not any(report.kept for report in part):
                return ValueError(
                    f"no row of the {name} data is left. Give a larger limit, another "
                    "--truncation, or other data."
                )
        return None

    def _show_draws(self, train: Blend, kept: list[int]) -> ValueError | None:
        """Print how often an epoch draws each source; return the error of wrong weights."""
        names = [source.name for source, _ in train.pieces]
        try:
            draws = epoch_draws(
                names, kept, weights=self.data.blend, temperature=self.data.blend_temperature
            )
        except ValueError as error:
            return error
        if draws is not None:
            print("  an epoch draws")
            for name, (size, count) in zip(names, draws, strict=True):
                print(
                    f"    {name}: {count} rows, {count / max(1, size):.2f} passes over its {size}"
                )
            print()
        return None

    def _show_source(
        self, step: int, source: Source, train: Part, held_out: Part
    ) -> tuple[Survey, Survey]:
        print(f"  {source.name}: {len(train)} rows to train on, {len(held_out)} held out")
        self._show_columns(step, source)
        self._show_bad_rows(step, source)
        dataset = self._build_dataset(step, Blend([(source, train)]))
        survey = survey_rows(dataset, num_examples=self.options.num_shown, name=source.name)
        self._show_survey(step, dataset, survey)
        other = self._build_dataset(step, Blend([(source, held_out)]))
        held_out_survey = survey_rows(other, num_examples=0, name=source.name)
        if len(held_out):
            limit = f"{other.limit_flag} {other.limit}"
            _print_line("held out", held_out_survey.report.describe(limit))
        _print_faults("cannot be shown", [*survey.report.faults, *held_out_survey.report.faults])
        print()
        for example in survey.examples:
            self._show_example(example)
        return survey, held_out_survey

    def _show_columns(self, step: int, source: Source) -> None:
        columns = survey_columns(source, step=step)
        first = f" of the first {SAMPLE_ROWS}" if len(source.train) > SAMPLE_ROWS else ""
        forms = [f"{name} ({count}{first} rows)" for name, count in columns.forms.most_common()]
        _print_line("form", ", ".join(forms))
        _print_line("columns", f"used: {_list_counts(columns.used)}")
        rewards: Counter = Counter()
        if step == 3:
            further = source.train.columns
            rewards = Counter(
                {name: columns.unused[name] for name in columns.unused if name in further}
            )
        for use, counts in (("for --reward_fn", rewards), ("not used", columns.unused - rewards)):
            if counts:
                _print_line("", f"{use}: {_list_counts(counts)}")

    def _show_bad_rows(self, step: int, source: Source) -> None:
        needs = STEPS[step][1]
        parts = [part for part in (source.train, source.eval) if part is not None]
        num_rows = sum(len(part) for part in parts)
        num_lacking = sum(int((~part.has[needs]).sum()) for part in parts)
        if num_lacking:
            _print_line(
                "lacking", f'{num_lacking} of its {num_rows} rows in all steps have no "{needs}"'
            )
        bad = find_bad_rows(source)
        if bad.num_close:
            _print_line(
                "close", f"{bad.num_close} rows have no pair whose margin is --min_margin or more"
            )
        count = f"{len(bad.faults)} of {bad.num_rows} rows cannot be read"
        if bad.faults and source.name in self.listed:
            _print_line("bad rows", f"{count}, see step {self.listed[source.name]}")
            return
        _print_faults(count, [str(fault) for fault in bad.faults])
        self.listed[source.name] = step

    def _show_survey(self, step: int, dataset: TextDataset, survey: Survey) -> None:
        if not survey.lengths:
            return
        report = survey.report
        formats = ", ".join(sorted(survey.formats))
        _print_line("text", f"{formats}; an answer ends with {' or '.join(sorted(survey.ends))}")
        lengths = survey.lengths
        _print_line(
            "tokens",
            f"median {percentile(lengths, 0.5)}, 95% up to {percentile(lengths, 0.95)}, longest "
            f"{max(lengths)}; {dataset.limit_flag} is {dataset.limit}",
        )
        if report.num_cut:
            share = report.num_cut / report.num_rows
            _print_line("cut", f"{report.num_cut} rows ({share:.1%})")
        for reason, count in report.left_out.most_common():
            _print_line("left out", f"{count} rows ({count / report.num_rows:.1%}): {reason}")
        if report.num_hidden_turns:
            _print_line(
                "hidden",
                f"{report.num_hidden_turns} earlier answers are not learned, since the chat "
                "template shows them differently later on",
            )
        if step != 3 and survey.num_item_tokens:
            share = survey.num_learned / survey.num_item_tokens
            _print_line(
                "learned" if step == 1 else "answers",
                f"{survey.num_learned} of {survey.num_item_tokens} tokens ({share:.1%})",
            )

    def _build_dataset(self, step: int, rows: Blend) -> TextDataset:
        shared: dict[str, Any] = dict(
            prompt_format=self.data.prompt_format, truncation=self.data.truncation
        )
        if step == 3:
            limit = self.options.max_prompt_seq_len
            return PromptDataset(rows, self.tokenizer, max_prompt_len=limit, **shared)
        shared["max_seq_len"] = self.data.max_seq_len
        shared["end_token_id"] = self.tokenizer.eos_token_id
        if step == 1:
            return SFTDataset(rows, self.tokenizer, train_on=self.data.train_on, **shared)
        return PairDataset(rows, self.tokenizer, **shared)

    def _show_example(self, example: Example) -> None:
        """Print a row's place, and its texts with what is learned set off."""
        item = example.item
        num_learned, num_tokens = count_learned(item)
        counts = f"{num_tokens} tokens, {num_learned} learned"
        if "chosen_ids" in item:
            counts = " + ".join(
                str(len(item[f"{name}_ids"])) for name in ("prompt", "chosen", "rejected")
            )
            counts += " tokens of prompt, chosen and rejected"
        elif "labels" not in item:
            counts = f"{num_tokens} tokens"
        if example.num_tokens > num_tokens:
            counts += f", cut from {example.num_tokens}"
        print(f"    {example.row.place}: {counts}")
        for name, segments in _segments(item, self.tokenizer):
            self._print_text(name, segments)
        if example.row.margin is not None:
            print(f"      margin: {example.row.margin:g}")
        print()

    def _print_text(self, name: str, segments: Segments) -> None:
        print(f"      {name}:")
        text = "".join(self._paint(text, color) for text, color in segments)
        for line in text.split("\n"):
            print(f"        {line}".rstrip(" "))

    def _paint(self, text: str, color: int | None) -> str:
        text = escape_controls(text)
        if color is None or not text:
            return text
        if not self.color:
            return f"«{text}»"
        # Each line alone: pagers end a colour with its line.
        lines = text.split("\n")
        return "\n".join(f"\033[{color}m{line}\033[0m" if line else line for line in lines)


def _segments(item: dict, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Segments]]:
    """Yield the texts of a prepared item, by name."""
    if "chosen_ids" in item:
        prompt = item["prompt_ids"]
        yield "prompt", [(tokenizer.decode(prompt), None)]
        for name, color in (("chosen", GREEN), ("rejected", RED)):
            ids = prompt + item[f"{name}_ids"]
            mask = [i >= len(prompt) for i in range(len(ids))]
            *_, (answer, _) = _split_learned(ids, mask, tokenizer)
            yield name, [(answer, color)]
    elif "labels" in item:
        parts = _split_learned(item["input_ids"], learned_mask(item), tokenizer)
        yield "text", [(text, GREEN if is_learned else None) for text, is_learned in parts]
    else:
        yield "prompt", [(tokenizer.decode(item["input_ids"]), None)]


def _split_learned(
    ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Decode `ids` as parts that are learned or not."""
    parts = []
    end = 0
    before = ""
    for is_learned, group in groupby(mask):
        end += len(list(group))
        # Decoded from the beginning: a tokenizer may drop the space before the first token.
        text = tokenizer.decode(ids[:end])
        parts.append((text[len(before) :], is_learned))
        before = text
    return parts


def _use_color(choice: str) -> bool:
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _list_counts(counts: Counter) -> str:
    """List names with their counts, such as "chosen (20), prompt (20)"."""
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _print_line(label: str, text: str) -> None:
    print(f"    {label:{LABEL_WIDTH}}{text}")


def _print_faults(title: str, faults: Sequence[str]) -> None:
    """Print the first faults, and the number of all."""
    if not faults:
        return
    count = "" if title[0].isdigit() else f"{len(faults)} rows "
    _print_line("bad rows", f"{count}{title}:")
    for fault in faults[:FAULTS_SHOWN]:
        _print_line("", escape_controls(fault))
    if len(faults) > FAULTS_SHOWN:
        _print_line("", f"... and {len(faults) - FAULTS_SHOWN} more.")


@contextmanager
def _quiet(name: str, least: int) -> Iterator[None]:
    """Hide a logger's lines below the level `least`."""
    module_logger = logging.getLogger(name)
    level = module_logger.level
    module_logger.setLevel(least)
    try:
        yield
    finally:
        module_logger.setLevel(level)


if __name__ == "__main__":
    run_main(main)
