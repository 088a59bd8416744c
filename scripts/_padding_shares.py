"""Shares of real tokens in training batches of files of data, padded, grouped and packed."""

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dschat.algorithms.grouping import group_by_length
from dschat.config.parse import parse_config
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.data.collate import collate_pairs, collate_text
from dschat.data.datasets import IGNORED
from dschat.data.loaders import batch_lengths, build_pair_data, build_sft_data, make_loaders

VOCABULARY = 8192
ROWS = 16  # of a micro-batch without options
# Name, flags and gradient accumulation; {tokens} is four times --max_seq_len.
SETTINGS = (
    ("padded, 16 rows a micro-batch", "", 1),
    ("--tokens_per_batch {tokens}, 16 rows an update", "--tokens_per_batch {tokens}", 1),
    ("--tokens_per_batch {tokens}, 64 rows an update", "--tokens_per_batch {tokens}", 4),
    ("--tokens_per_batch {tokens}, 256 rows an update", "--tokens_per_batch {tokens}", 16),
    ("--packing, 16 rows a micro-batch", "--packing", 1),
)


# Of step 3: rows of an update.
UPDATES = (16, 64, 256)


def measure(paths: list[str], *, tokenizer: str | None, max_seq_len: int) -> list[dict]:
    """Print and return the share of real tokens for each file, step and setting.

    Args:
        paths: files of JSON lines, each measured alone. One without pairs counts in step 1 alone.
        tokenizer: a folder or hub name; None: a byte-level BPE trained on the file.
        max_seq_len: the longest text in tokens.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = []
    for path in paths:
        words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else train_bpe(Path(path))
        for step in (1, 2):
            for name, flags, accumulation in SETTINGS:
                name = name.format(tokens=4 * max_seq_len)
                flags = flags.format(tokens=4 * max_seq_len)
                flags = f"{flags} --gradient_accumulation_steps {accumulation}"
                try:
                    counts = count_tokens(path, flags, step, words, max_seq_len=max_seq_len)
                except ValueError as error:
                    print(f"{path}, step {step}: left out. {str(error).splitlines()[0]}")
                    break
                row = {"data": path, "step": step, "setting": name, "max_seq_len": max_seq_len}
                row |= counts
                found.append(row)
                print(
                    f"{path}, step {step}, {name}: {row['texts']} texts, "
                    f"{100 * row['real_share']:.1f}% real, "
                    f"{row['computed_to_real']:.3f} computed tokens a real one",
                    flush=True,
                )
        for row in ppo_rows(path, words, max_seq_len=max_seq_len):
            found.append({"data": path, "step": 3, "max_seq_len": max_seq_len} | row)
            print(f"{path}, step 3, {row['setting']}: {100 * row['real_share']:.1f}% real")
    return found


def ppo_rows(path: str, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int) -> Iterator[dict]:
    """Yield the shares of real tokens in updates and scoring of step 3, if policies answered as the
    file does.

    Prompts have at most half of `max_seq_len` tokens, and answers are cut to as many.
    """
    rows = answer_lengths(path, tokenizer, longest=max_seq_len // 2)
    random.Random(0).shuffle(rows)
    tokens = 4 * max_seq_len
    for per_update in UPDATES:
        updates = [rows[i : i + per_update] for i in range(0, len(rows), per_update)]
        plain = [u[i : i + ROWS] for u in updates for i in range(0, len(u), ROWS)]
        columns = [len(u) * (max(p for p, _ in u) + max(a for _, a in u)) for u in plain]
        yield _ppo_row(f"padded, {per_update} rows an update", rows, columns)
        columns = []
        for lengths in ([p + a for p, a in update] for update in updates):
            for group in group_by_length(lengths, tokens=tokens):
                columns.append(len(group) * max(lengths[i] for i in group))
        name = f"--training_tokens_per_batch {tokens}, {per_update} rows an update"
        yield _ppo_row(name, rows, columns)


def _ppo_row(setting: str, rows: list[tuple[int, int]], columns: list[int]) -> dict:
    real = sum(prompt + answer for prompt, answer in rows)
    return {
        "setting": setting,
        "texts": len(rows),
        "micro_batches": len(columns),
        "real_tokens": real,
        "computed_tokens": sum(columns),
        "real_share": round(real / sum(columns), 4),
        "computed_to_real": round(sum(columns) / real, 4),
    }


def answer_lengths(
    path: str, tokenizer: PreTrainedTokenizerBase, *, longest: int
) -> list[tuple[int, int]]:
    """Return the tokens of the prompt and the last answer of each row with a prompt that fits."""
    with tempfile.TemporaryDirectory() as cache:
        words = (
            f"--model_name_or_path none --data_path {path} --max_seq_len 1000000 --train_on last "
            f"--data_output_path {cache} --skip_bad_rows --data_split 1,0,0"
        )
        config = parse_config(SFTConfig, words.split())
        train, _ = build_sft_data(config.data, tokenizer, end_token_id=tokenizer.eos_token_id)
        labels = [train[i]["labels"] for i in range(len(train))]
    counts = [(row.count(IGNORED), len(row)) for row in labels]
    return [(p, min(both - p, longest)) for p, both in counts if p <= longest]


def count_tokens(
    path: str, flags: str, step: int, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int
) -> dict:
    """Return the real and computed tokens of the first epoch, as the step's loader deals them out.

    Raises:
        ValueError: the file does not suit the step.
    """
    with tempfile.TemporaryDirectory() as cache:
        words = (
            f"--model_name_or_path none --data_path {path} --max_seq_len {max_seq_len} "
            f"--per_device_train_batch_size {ROWS} --data_output_path {cache} {flags} "
            f"--skip_bad_rows --data_split {'1,0,0' if step == 1 else '0,1,0'}"
        )
        config = parse_config(SFTConfig if step == 1 else RewardConfig, words.split())
        build = build_sft_data if step == 1 else build_pair_data
        train, held_out = build(config.data, tokenizer, end_token_id=tokenizer.eos_token_id)
        row_tokens = max_seq_len if step == 1 else 2 * max_seq_len
        loader, _ = make_loaders(
            train,
            held_out,
            collate_text if step == 1 else collate_pairs,
            pad_id=tokenizer.pad_token_id,
            train_batch_size=ROWS,
            eval_batch_size=ROWS,
            window=config.schedule.gradient_accumulation_steps,
            seed=config.run.seed,
            pack_to=row_tokens if config.batch.packing else None,
            tokens_per_batch=config.batch.tokens_per_batch,
        )
        batches = list(batch_lengths(train, loader, config.batch.tokens_per_batch))
    real = sum(int(lengths.sum()) for lengths in batches)
    computed = sum(lengths.size * int(lengths.max()) for lengths in batches)
    return {
        "texts": len(train),
        "micro_batches": len(batches),
        "real_tokens": real,
        "computed_tokens": computed,
        "real_share": round(real / computed, 4),
        "computed_to_real": round(computed / real, 4),
    }


def train_bpe(path: Path) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the strings of a JSON-lines file."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(path, encoding="utf-8") as file:
        core.train_from_iterator(_strings(json.loads(line) for line in file), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def _strings(values) -> Iterator[str]:
    """Yield the strings in nested lists and dictionaries, names of fields excepted."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _strings(value.values())
        elif isinstance(value, list):
            yield from _strings(value)
