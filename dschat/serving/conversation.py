"""Conversations as token ids, in the prompt format of the training steps."""

from transformers import PreTrainedTokenizerBase

from dschat.data.encoding import Encoder
from dschat.data.row import Row
from dschat.data.templates import HUMAN


def chat_format(prompt_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Resolve "auto": "chat" if the tokenizer has a template, else "human_assistant"."""
    if prompt_format != "auto":
        return prompt_format
    return "chat" if tokenizer.chat_template else "human_assistant"


def stop_texts(prompt_format: str) -> tuple[str, ...]:
    """Return the texts that end an answer; none if only a token id does.

    A model that has not learned to end its answer would begin the user's next turn by this text.
    """
    return (HUMAN,) if prompt_format == "human_assistant" else ()


def fit_conversation(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, *, prompt_format: str, max_tokens: int
) -> tuple[list[int], int]:
    """Encode a conversation, leaving out its oldest turns if it is too long.

    Whole turns are left out until the rest has at most `max_tokens` ids. A system message in front
    stays.

    Args:
        messages: dicts with "role" and "content"; the last message is the user's.
        tokenizer: the model's tokenizer.
        prompt_format: "chat", "human_assistant" or "plain" (the contents joined as they are).
        max_tokens: the largest number of ids.

    Returns:
        The ids up to where the answer begins, and the number of messages left out.

    Raises:
        ValueError: the last message alone is too long, is empty, or the chat template refuses the
            conversation.
    """
    encoder = Encoder(tokenizer, prompt_format=prompt_format)
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    # Each turn begins with the user's message.
    begins = [i for i, message in enumerate(turns) if i == 0 or message["role"] == "user"]
    for begin in begins:
        kept = [*system, *turns[begin:]]
        prompt: str | list[dict] = kept
        if prompt_format == "plain":
            prompt = "".join(message["content"] for message in kept)
        ids = encoder.encode(Row(prompt, place="the conversation")).prompt
        if not ids:
            raise ValueError("the message has no tokens; write at least one word.")
        if len(ids) <= max_tokens:
            return ids, begin
    raise ValueError(
        f"the last message alone has {len(ids)} tokens, and there is room for {max_tokens}: "
        "shorten it, raise --max_prompt_seq_len, or lower --max_new_tokens if the model's "
        "positions are the limit."
    )
