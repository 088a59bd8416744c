"""General text for the PTX loss of step 3: an endless stream of blocks of equal length."""

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dschat.algorithms.types import TextBatch
from dschat.data.readers import BARE_TEXT, read_records
from dschat.runtime.paths import user_path

logger = logging.getLogger(__name__)

HASHED_TEXTS = 10_000  # of a hub dataset, which may be too large to read in full
FLAG = "--unsupervised_dataset_name"
TEXT_TYPES = ("string", "large_string", "string_view", "null")  # "null": a set without any text


def load_texts(
    name: str, config_name: str | None = None, cache_dir: str | None = None
) -> Sequence[str]:
    """Load the texts of a local file or a hub dataset.

    The texts of a .txt file are its paragraphs. A .jsonl or .json file and a hub dataset have them
    in the field text.

    Args:
        name: a .txt, .jsonl or .json file, or a hub name.
        config_name: the configuration of the hub dataset.
        cache_dir: folder for downloads from the hub; None: that of the datasets library.

    Raises:
        ValueError: no such file or dataset, no text in it, or no field text of strings; names the
            flag.
    """
    path = user_path(name)
    if path.suffix in (".txt", ".jsonl", ".json"):
        try:
            exists = path.is_file()
        except OSError as error:  # a name that is too long, or a folder that may not be read
            raise ValueError(
                f"{FLAG} {name}: {error.strerror}. Give a path that exists."
            ) from error
        if not exists:
            raise ValueError(f"{FLAG} {name}: no such file.")
        texts: Sequence[str] = _load_local_texts(path)
    else:
        texts = _load_hub_texts(name, config_name, cache_dir)
    if not len(texts):
        raise ValueError(f"{FLAG} {name}: no text in it.")
    return texts


class PTXBatches:
    """Endless iterator of `TextBatch` [batch_size, block_size] without padding.

    Each rank reads different texts. Texts are tokenized when they are reached, ended with EOS and
    concatenated. Each pass over the texts has a different order.
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
        self.texts = texts
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.digest = _digest(texts)
        self._epoch = 0
        self._place = 0  # texts of the epoch that are read
        self._held: list[int] = []  # tokens of these that are in no batch yet
        self._order = self._order_of_epoch(0)

    def __iter__(self) -> Iterator[TextBatch]:
        """Return this iterator."""
        return self

    def __next__(self) -> TextBatch:
        """Return the next batch."""
        needed = self.batch_size * self.block_size
        while len(self._held) < needed:
            if self._place == len(self._order):
                self._epoch += 1
                self._place = 0
                self._order = self._order_of_epoch(self._epoch)
            text = self.texts[self._order[self._place]]
            self._held += self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id]
            self._place += 1
        ids = torch.tensor(self._held[:needed]).view(self.batch_size, self.block_size)
        self._held = self._held[needed:]
        return TextBatch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone())

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the position in the stream: an empty dict of tensors, and JSON values."""
        return {}, {"epoch": self._epoch, "place": self._place, "held": self._held}

    def restore(self, saved) -> None:
        """Continue from the position that ``state`` returned.

        With another number of ranks, continue at about the same position in the epoch.
        """
        _, values = saved.of_rank(None if saved.same_processes else 0)
        self._epoch = values["epoch"]
        self._place = values["place"]
        self._held = values["held"]
        self._order = self._order_of_epoch(self._epoch)
        if not saved.same_processes:
            place = self._place * saved.checkpoint.processes // self.world_size
            self._place = min(place, len(self._order))
            self._held = []

    def _order_of_epoch(self, epoch: int) -> list[int]:
        order = list(range(len(self.texts)))
        random.Random(f"ptx {self.seed} {epoch}").shuffle(order)
        # With fewer texts than ranks, each rank reads all of them.
        return order[self.rank :: self.world_size] if len(order) >= self.world_size else order


def _digest(texts: Sequence[str]) -> str:
    """Return a hash of the texts: of all of a file's, or of a sample of a hub dataset's."""
    stride = 1 if isinstance(texts, list) else max(1, len(texts) // HASHED_TEXTS)
    digest = hashlib.sha256(str(len(texts)).encode())
    for i in range(0, len(texts), stride):
        encoded = texts[i].encode("utf-8", errors="surrogatepass")
        digest.update(f" {len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()


def _load_local_texts(path: Path) -> list[str]:
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
    texts = []
    for line, row in zip(records.lines, records.rows, strict=True):
        text = row.get("text", row.get(BARE_TEXT))
        texts.append(text)
        if not isinstance(text, str):
            faults.append(f"line {line}: no field text")
        elif text != text.encode("utf-8", errors="replace").decode("utf-8"):
            faults.append(f'line {line}: field "text" is not valid UTF-8')
    if faults:
        raise ValueError(f"{FLAG} {path}, {faults[0]}.")
    return [text for text in texts if text.strip()]


def _load_hub_texts(name: str, config_name: str | None, cache_dir: str | None) -> Sequence[str]:
    import datasets

    try:
        data = datasets.load_dataset(name, config_name, split="train", cache_dir=cache_dir)
    except Exception as error:  # many kinds, for an unknown name or without a network
        raise ValueError(
            f"{FLAG} {name}: cannot be loaded ({error}). Give a local .txt or .jsonl file, or a "
            "hub name."
        ) from error
    if "text" not in data.column_names:
        raise ValueError(
            f"{FLAG} {name}: no field text among {', '.join(data.column_names)}. Give a set with a "
            "field text of strings."
        )
    kind = getattr(data.features["text"], "dtype", data.features["text"])
    if kind not in TEXT_TYPES:
        raise ValueError(
            f"{FLAG} {name}: its field text holds {kind}, not strings. Give a set with a field "
            "text of strings."
        )
    has_text = data.data.column("text").is_valid().to_numpy()
    if not has_text.all():
        logger.warning(
            "%s %s: left out %d rows of %d: their field text is null",
            FLAG,
            name,
            len(has_text) - int(has_text.sum()),
            len(has_text),
        )
        data = data.select(has_text.nonzero()[0])
    return data["text"]
