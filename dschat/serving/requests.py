"""Requests to the chat server."""

import json

from dschat.data.messages import validate_messages

REQUEST_FIELDS = ("messages", "max_new_tokens")


def read_request(body: bytes, *, max_turns: int, max_new_tokens: int) -> tuple[list[dict], int]:
    """Parse and check the body of a request.

    Args:
        body: JSON, {"messages": [{"role": "user", "content": "..."}, ...], "max_new_tokens": 64};
            the number is optional and defaults to `max_new_tokens`.
        max_turns: pairs of messages that a request may hold, not counting a system message.
        max_new_tokens: the highest number that a request may ask for.

    Returns:
        The messages, and the largest number of tokens of the answer.

    Raises:
        ValueError: the request is not valid; the message says why.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ValueError(
            f"the body is a JSON {type(request).__name__}, not an object with messages"
        )
    unknown = sorted(set(request) - set(REQUEST_FIELDS))
    if unknown:
        raise ValueError(f"unknown field {unknown[0][:80]!r}; known: {', '.join(REQUEST_FIELDS)}")
    if "messages" not in request:
        raise ValueError('no field "messages"')
    messages = validate_messages(request["messages"], "messages")
    num_system = sum(message["role"] == "system" for message in messages)
    if len(messages) - num_system > 2 * max_turns or num_system > 1:
        raise ValueError(
            f"{len(messages)} messages, {num_system} of them from the system: at most "
            f"{2 * max_turns} (--max_turns {max_turns}) and 1 from the system are allowed. "
            "Begin a new conversation."
        )
    number = request.get("max_new_tokens", max_new_tokens)
    # bool is a subclass of int, and true is no number of tokens.
    if type(number) is not int or not 1 <= number <= max_new_tokens:
        raise ValueError(
            f"max_new_tokens is {json.dumps(number)[:40]}; give a whole number from 1 to "
            f"{max_new_tokens}"
        )
    return messages, number
