"""A conversation to the ids that the model reads, by the same form as the rows of the steps; and requests by JSON."""

import json

from transformers import PreTrainedTokenizerBase

from dschat.data.encoding import encode_prompt, leading_ids
from dschat.data.rows import Row, checked_messages
from dschat.data.templates import HUMAN, render

REQUEST_FIELDS = ("messages", "max_new_tokens")


def chat_format(prompt_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What "auto" stands for in a conversation: "chat" where the tokenizer has a template, else "human_assistant"."""
    if prompt_format != "auto":
        return prompt_format
    return "chat" if tokenizer.chat_template else "human_assistant"


def stop_text(prompt_format: str) -> str | None:
    """The text by which a model that has not learned to end would begin the user's next turn; None: an id alone ends."""
    return HUMAN if prompt_format == "human_assistant" else None


def fit_conversation(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, *, prompt_format: str, max_tokens: int
) -> tuple[list[int], int]:
    """The ids of a conversation up to where its answer begins, and how many of its oldest messages were left out.

    Whole turns are left out until the rest has at most `max_tokens` ids; a system message in front stays.

    Args:
        messages: of {"role", "content"}; the last is the user's.
        prompt_format: "chat", "human_assistant" or "plain" (the texts joined as they stand).

    Raises:
        ValueError: the last message alone is too long, is empty, or the chat template refuses the conversation.
    """
    lead = leading_ids(tokenizer)
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    # Each turn begins with the user's message.
    begins = [i for i, message in enumerate(turns) if i == 0 or message["role"] == "user"]
    for begin in begins:
        kept = [*system, *turns[begin:]]
        plain = prompt_format == "plain"
        row = Row("".join(message["content"] for message in kept) if plain else kept, place="the conversation")
        ids = encode_prompt(tokenizer, render(row, prompt_format=prompt_format, tokenizer=tokenizer)[0], lead)
        if not ids:
            raise ValueError("the message has no tokens; write at least one word.")
        if len(ids) <= max_tokens:
            return ids, begin
    raise ValueError(
        f"the last message alone makes {len(ids)} tokens, and there is room for {max_tokens}: shorten it, raise "
        "--max_prompt_seq_len, or lower --max_new_tokens where the model's positions are the limit."
    )


def read_request(body: bytes, *, max_turns: int, max_new_tokens: int) -> tuple[list[dict], int]:
    """The messages of a request, and the most tokens of its answer.

    Args:
        body: JSON, {"messages": [{"role": "user", "content": "..."}, ...], "max_new_tokens": 64}; the number may be
            missing, and is then `max_new_tokens`.
        max_turns: pairs of messages that a request may hold, a system message apart.
        max_new_tokens: the highest number that a request may ask for.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ValueError(f"the body is a JSON {type(request).__name__}, not an object with messages")
    if unknown := sorted(set(request) - set(REQUEST_FIELDS)):
        raise ValueError(f"unknown field {unknown[0][:80]!r}; known: {', '.join(REQUEST_FIELDS)}")
    if "messages" not in request:
        raise ValueError('no field "messages"')
    messages = checked_messages(request["messages"], "messages")
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) > 2 * max_turns or len(messages) > len(turns) + 1:
        raise ValueError(
            f"messages: {len(messages)}, of which {len(messages) - len(turns)} of the system; at most {2 * max_turns} "
            f"(--max_turns {max_turns}) and 1 of the system are allowed. Begin a new conversation."
        )
    number = request.get("max_new_tokens", max_new_tokens)
    if type(number) is not int or not 1 <= number <= max_new_tokens:
        raise ValueError(f"max_new_tokens is {json.dumps(number)[:40]}; give a whole number from 1 to {max_new_tokens}")
    return messages, number
