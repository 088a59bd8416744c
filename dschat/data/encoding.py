"""Text to token ids, such that a prompt has the same ids in every step."""

from transformers import PreTrainedTokenizerBase


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts in front of a text, such as BOS; often none."""
    bare = _ids(tokenizer, "a")
    full = tokenizer("a")["input_ids"]
    begin = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:begin])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, lead: list[int]) -> list[int]:
    """`lead` (see `leading_ids`) and the ids of `text`; `lead` only once where a chat template has written it."""
    ids = _ids(tokenizer, text)
    return ids if ids[: len(lead)] == lead else lead + ids


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt_text: str,
    prompt_ids: list[int],
    answer_text: str,
    lead: list[int],
) -> list[int]:
    """The ids of `answer_text` behind a prompt, without BOS or EOS.

    Both are tokenised as one text, as the answer would be read. Where a token would span the border, the answer is
    tokenised alone instead, because step 3 tokenises prompts alone and must see the ids that steps 1 and 2 saw.
    """
    joint = encode_prompt(tokenizer, prompt_text + answer_text, lead)
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    return _ids(tokenizer, answer_text)


def trim_prompt(ids: list[int], *, room: int, num_lead: int) -> list[int]:
    """The leading ids and the last ids of a prompt that fit into `room`; no less than the leading ids."""
    if len(ids) <= room:
        return ids
    return ids[:num_lead] + ids[len(ids) - max(0, room - num_lead) :]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: the warning about the model's length would come before the text is cut to it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
