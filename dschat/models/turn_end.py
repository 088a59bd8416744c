"""The end of a turn, as a tokenizer's chat template writes it."""

from transformers import PreTrainedTokenizerBase

PROBE = "\ue000"  # from Unicode's private use area: no template contains it


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    r"""Return what the chat template writes after the assistant's words, such as "<|im_end|>\n".

    The text is empty if there is no template, if it writes nothing there, or if it fails.
    """
    if not tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program
        return ""
    return text.partition(PROBE)[2]


def split_turn_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str]:
    """Return the token that ends a turn, and what the template writes before it.

    Returns:
        The token's id; None if the template has no end, or writes it with ordinary tokens. The text
        between an answer's words and that token: a space in Llama-2's template. Without a token,
        it is the whole end without the white space after it.
    """
    end = turn_end(tokenizer)
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    special |= {token: vocabulary[token] for token in tokenizer.all_special_tokens}
    places = [(end.find(token), -len(token), token) for token in special if token in end]
    if not places:
        return None, end.rstrip()
    begin, _, token = min(places)
    return special[token], end[:begin]
