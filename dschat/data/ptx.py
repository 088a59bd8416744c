"""General text for the PTX loss of step 3: an endless stream of blocks of equal length."""

import logging
import random
from pathlib import Path
from typing import Iterator, Optional, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dschat.algorithms.types import TextBatch
from dschat.data.readers import read_records
from dschat.runtime.paths import user_path

logger = logging.getLogger(__name__)

FLAG = "--unsupervised_dataset_name"
TEXT_TYPES = ("string", "large_string", "string_view", "null")  # the last of sets without any text


def load_texts(
    name: str, config_name: Optional[str] = None, cache_dir: Optional[str] = None
) -> Sequence[str]:
    """The texts of a local .txt file (its paragraphs), a .jsonl or .json file or a hub data set (the field text).

    Raises:
        ValueError: no such file or data set, nothing in it, or no field text of strings; names the flag.
    """
    path = user_path(name)
    if path.suffix in (".txt", ".jsonl", ".json"):
        try:
            there = path.is_file()
        except OSError as error:  # names that are too long, folders that may not be looked into
            raise ValueError(
                f"{FLAG} {name}: {error.strerror}. Give a path that exists."
            ) from error
        if not there:
            raise ValueError(f"{FLAG} {name}: no such file.")
        texts = _local_texts(path)
    else:
        texts = _hub_texts(name, config_name, cache_dir)
    if not len(texts):
        raise ValueError(f"{FLAG} {name}: no text in it.")
    return texts


class PTXBatches:
    """Endless TextBatches [batch_size, block_size] without padding; each process reads texts of its own.

    Texts are tokenised as they are reached, closed by EOS and joined; each pass has an order of its own.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        block_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self.texts, self.tokenizer, self.seed = texts, tokenizer, seed
        self.batch_size, self.block_size = batch_size, block_size
        self.rank, self.world_size = rank, world_size
        self._epoch, self._place, self._held = (
            0,
            0,
            [],
        )  # pass, texts of it that are read, tokens not given out yet
        self._order = self._order_of(0)

    def __iter__(self) -> Iterator[TextBatch]:
        return self

    def __next__(self) -> TextBatch:
        needed = self.batch_size * self.block_size
        while len(self._held) < needed:
            if self._place == len(self._order):
                self._epoch, self._place = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            text = self.texts[self._order[self._place]]
            self._held += self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id]
            self._place += 1
        ids = torch.tensor(self._held[:needed]).view(self.batch_size, self.block_size)
        self._held = self._held[needed:]
        return TextBatch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone())

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Where the stream stands: no tensors, and JSON."""
        return {}, {"epoch": self._epoch, "place": self._place, "held": self._held}

    def restore(self, saved) -> None:
        """Go on from where ``state`` was taken; of as many processes, or of others at about the same place."""
        _, values = saved.of_rank(None if saved.same_processes else 0)
        self._epoch, self._place, self._held = values["epoch"], values["place"], values["held"]
        self._order = self._order_of(self._epoch)
        if not saved.same_processes:
            read = self._place * saved.checkpoint.processes // self.world_size
            self._place, self._held = min(read, len(self._order)), []

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self.texts)))
        random.Random(f"ptx {self.seed} {epoch}").shuffle(order)
        # With fewer texts than processes each reads all of them.
        return order[self.rank :: self.world_size] if len(order) >= self.world_size else order


def _local_texts(path: Path) -> list[str]:
    if path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{FLAG} {path}: not valid UTF-8: {error.reason} at byte {error.start}."
            ) from error
        return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
    records = read_records(path)
    faults = [f"line {line}: {message}" for line, message in records.faults]
    for line, row in zip(records.lines, records.rows):
        if not isinstance(row.get("text"), str):
            faults.append(f"line {line}: no field text")
        elif row["text"] != row["text"].encode("utf-8", errors="replace").decode("utf-8"):
            faults.append(f'line {line}: field "text" is not valid UTF-8')
    if faults:
        raise ValueError(f"{FLAG} {path}, {faults[0]}.")
    return [row["text"] for row in records.rows if row["text"].strip()]


def _hub_texts(name: str, config_name: Optional[str], cache_dir: Optional[str]) -> Sequence[str]:
    import datasets

    try:
        data = datasets.load_dataset(name, config_name, split="train", cache_dir=cache_dir)
    except (
        Exception
    ) as error:  # the library raises many kinds for an unknown name or an absent network
        raise ValueError(
            f"{FLAG} {name}: cannot be loaded ({error}). Give a local .txt or .jsonl file, or a hub name."
        ) from error
    if "text" not in data.column_names:
        raise ValueError(f"{FLAG} {name}: no field text among {', '.join(data.column_names)}.")
    kind = getattr(data.features["text"], "dtype", data.features["text"])
    if kind not in TEXT_TYPES:
        raise ValueError(
            f"{FLAG} {name}: its field text holds {kind}, not texts. Give a set whose field text is a string."
        )
    there = data.data.column("text").is_valid().to_numpy()
    if not there.all():
        num_null = len(there) - int(there.sum())
        logger.warning(
            "%s %s: left out %d rows of %d: their field text is null",
            FLAG,
            name,
            num_null,
            len(there),
        )
        data = data.select(there.nonzero()[0])
    return data["text"]
