"""General text for the PTX loss of step 3: an endless stream of blocks of equal length."""

import itertools
import random
from pathlib import Path
from typing import Iterator, Optional, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dschat.algorithms.types import TextBatch
from dschat.data.files import read_records

FLAG = "--unsupervised_dataset_name"


def load_texts(name: str, config_name: Optional[str] = None, cache_dir: Optional[str] = None) -> Sequence[str]:
    """The texts of a local .txt file (its paragraphs), a .jsonl or .json file or a hub data set (the field text).

    Raises:
        ValueError: no such file or data set, nothing in it, or no field text; names --unsupervised_dataset_name.
    """
    path = Path(name).expanduser()
    if path.suffix in (".txt", ".jsonl", ".json"):
        if not path.is_file():
            raise ValueError(f"{FLAG} {name}: no such file.")
        texts = _local_texts(path)
    else:
        texts = _hub_texts(name, config_name, cache_dir)
    if not len(texts):
        raise ValueError(f"{FLAG} {name}: no text in it.")
    return texts


def ptx_batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    block_size: int,
    rank: int,
    world_size: int,
    seed: int,
) -> Iterator[TextBatch]:
    """Endless TextBatches [batch_size, block_size] without padding; each process reads texts of its own.

    Texts are tokenised as they are reached, closed by EOS and joined; each pass has an order of its own.
    """
    blocks = _blocks(texts, tokenizer, block_size=block_size, rank=rank, world_size=world_size, seed=seed)
    while True:
        ids = torch.tensor(list(itertools.islice(blocks, batch_size)))
        yield TextBatch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone())


def _blocks(texts, tokenizer, *, block_size: int, rank: int, world_size: int, seed: int) -> Iterator[list[int]]:
    held: list[int] = []
    for epoch in itertools.count():
        order = list(range(len(texts)))
        random.Random(f"ptx {seed} {epoch}").shuffle(order)
        # With fewer texts than processes each reads all of them.
        for i in order[rank::world_size] if len(order) >= world_size else order:
            held += tokenizer(texts[i])["input_ids"] + [tokenizer.eos_token_id]
            full = len(held) // block_size * block_size
            yield from (held[start : start + block_size] for start in range(0, full, block_size))
            held = held[full:]


def _local_texts(path: Path) -> list[str]:
    if path.suffix == ".txt":
        paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]
    records = read_records(path)
    faults = [f"line {line}: {message}" for line, message in records.faults]
    for line, row in zip(records.lines, records.rows):
        if not isinstance(row.get("text"), str):
            faults.append(f"line {line}: no field text")
    if faults:
        raise ValueError(f"{FLAG} {path}, {faults[0]}.")
    return [row["text"] for row in records.rows if row["text"].strip()]


def _hub_texts(name: str, config_name: Optional[str], cache_dir: Optional[str]) -> Sequence[str]:
    import datasets

    try:
        data = datasets.load_dataset(name, config_name, split="train", cache_dir=cache_dir)
    except Exception as error:  # the library raises many kinds for an unknown name or an absent network
        raise ValueError(
            f"{FLAG} {name}: cannot be loaded ({error}). Give a local .txt or .jsonl file, or a hub name."
        ) from error
    if "text" not in data.column_names:
        raise ValueError(f"{FLAG} {name}: no field text among {', '.join(data.column_names)}.")
    return data["text"]
