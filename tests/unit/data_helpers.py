"""A byte-level tokenizer whose tokens can be counted by hand, and writers of small files."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(
    *,
    bos: bool = False,
    eos: bool = False,
    chat_template: str | None = None,
    special: Sequence[str] = (),
):
    """Build a tokenizer of one token per byte, plus one for " a" ("Ġa").

    Ids 0, 1 and 2 are <pad>, <s> and </s>. With `bos` or `eos`, the tokenizer adds that token to
    every text. `special` are further special tokens, from id 260 on.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters, "Ġa"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos or eos:
        form = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        core.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.chat_template = chat_template
    return tokenizer


def ids_of(text: str, tokenizer=None) -> list[int]:
    """Return the ids of `text` alone, byte by byte."""
    tokenizer = tokenizer or make_tokenizer()
    return [tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in text]


def write_lines(path: Path, rows: list) -> str:
    """Write `rows` as JSON lines, strings and bytes unchanged; return the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for row in rows:
            if not isinstance(row, str | bytes):
                row = json.dumps(row)
            if isinstance(row, str):
                row = row.encode()
            file.write(row + b"\n")
    return str(path)


def pairs(num_rows: int, begin: int = 0) -> list[dict]:
    """Return preference pairs whose texts all differ."""
    return [
        {"prompt": f"p{number}", "chosen": f" good{number}", "rejected": f" bad{number}"}
        for number in range(begin, begin + num_rows)
    ]
