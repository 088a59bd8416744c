"""Tokenization that gives a prompt the same ids in every step."""

from transformers import PreTrainedTokenizerBase


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer adds before a text, such as BOS; often empty."""
    bare = _encode(tokenizer, "a")
    full = tokenizer("a")["input_ids"]
    begin = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:begin])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, lead: list[int]) -> list[int]:
    """Return `lead` (see `leading_ids`) followed by the ids of `text`.

    `lead` is not repeated if the text already begins with it, as chat templates often do.
    """
    ids = _encode(tokenizer, text)
    return ids if ids[: len(lead)] == lead else lead + ids


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt_text: str,
    prompt_ids: list[int],
    answer_text: str,
    lead: list[int],
) -> list[int]:
    """Return the ids of `answer_text` after a prompt, without BOS or EOS.

    Prompt and answer are tokenized as one text. If a token spans the border between them, the
    answer is tokenized alone: step 3 tokenizes prompts alone and must see the ids that steps 1 and
    2 saw.
    """
    joint = encode_prompt(tokenizer, prompt_text + answer_text, lead)
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    return _encode(tokenizer, answer_text)


def trim_prompt(ids: list[int], *, room: int, num_lead: int) -> list[int]:
    """Cut a prompt to `room` ids: the leading ids, then as many of the last ids as fit.

    The `num_lead` leading ids are always kept, even if `room` is smaller.
    """
    if len(ids) <= room:
        return ids
    num_last = max(0, room - num_lead)
    return ids[:num_lead] + ids[len(ids) - num_last :]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: the tokenizer would warn about long texts, but they are cut only after this.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
