"""Requests to the chat server."""

import json

from dschat.data.messages import validate_messages

REQUEST_FIELDS = ("messages", "max_new_tokens")


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
        raise ValueError(
            f"the body is a JSON {type(request).__name__}, not an object with messages"
        )
    if unknown := sorted(set(request) - set(REQUEST_FIELDS)):
        raise ValueError(f"unknown field {unknown[0][:80]!r}; known: {', '.join(REQUEST_FIELDS)}")
    if "messages" not in request:
        raise ValueError('no field "messages"')
    messages = validate_messages(request["messages"], "messages")
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) > 2 * max_turns or len(messages) > len(turns) + 1:
        raise ValueError(
            f"messages: {len(messages)}, of which {len(messages) - len(turns)} of the system; at most {2 * max_turns} "
            f"(--max_turns {max_turns}) and 1 of the system are allowed. Begin a new conversation."
        )
    number = request.get("max_new_tokens", max_new_tokens)
    if type(number) is not int or not 1 <= number <= max_new_tokens:
        raise ValueError(
            f"max_new_tokens is {json.dumps(number)[:40]}; give a whole number from 1 to {max_new_tokens}"
        )
    return messages, number
