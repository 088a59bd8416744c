"""Conversations in any of the forms in use, as one list of messages.

A message is a dictionary with ``role`` ("system", "user", "assistant" or "tool") and ``content`` (a
string), as chat templates read it. It may also have ``tool_calls``, ``reasoning_content``,
``tool_call_id``, ``name``, and ``learn`` (False: the turn is context only). Templates see all of
these but ``learn``.
"""

import json
from typing import Any

from dschat.data.text_checks import check_size, shorten, validate_text

ROLES = ("system", "user", "assistant", "tool")
# Other names of the roles: OpenAI's developer, ShareGPT's, Gemini's.
ROLE_NAMES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


def is_messages(value: object) -> bool:
    """Return whether `value` looks like a list of messages, in OpenAI's or ShareGPT's form."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and _first(item, ROLE_FIELDS) is not None for item in value)


def normalize_messages(messages: object, name: str) -> list[dict]:
    """Return a conversation in this module's form.

    Args:
        messages: a list of messages, in OpenAI's form (role, content, tool_calls) or in ShareGPT's
            (from, value).
        name: the field's name, for messages to the user.

    Raises:
        ValueError: `messages` is no such list; names the field and the message.
    """
    if not isinstance(messages, list):
        raise ValueError(f'field "{name}" is {shorten(messages)}, not a list of messages')
    if not messages:
        raise ValueError(f'field "{name}" is an empty list; it needs at least one message')
    found = [_normalize(message, f"{name}[{i}]") for i, message in enumerate(messages)]
    check_size(sum(len(message["content"].encode("utf-8")) for message in found), name)
    return found


def validate_messages(messages: object, name: str) -> list[dict]:
    """Return a conversation that ends with a message for the assistant to answer.

    Raises:
        ValueError: `messages` is no conversation, or ends otherwise; names the field.
    """
    found = normalize_messages(messages, name)
    if found[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f'field "{name}" does not end with a message of the user (or a tool) for the assistant '
            f"to answer: {shorten(messages)}"
        )
    return found


def add_system(messages: list[dict], system: object) -> list[dict]:
    """Put the system prompt of a column in front of a conversation.

    Raises:
        ValueError: the conversation has another one.
    """
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    text = validate_text(system, "system")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() == text.strip():
            return messages
        raise ValueError(
            f"the system prompt {shorten(text)} is in its own column, and the messages begin with "
            "another one; keep one of them"
        )
    return [{"role": "system", "content": text}, *messages]


def plain_text(answer: str | list[dict]) -> str:
    """Return the visible text of an answer: its contents, one after the other."""
    if isinstance(answer, str):
        return answer
    return "\n".join(message["content"] for message in answer)


def _normalize(message: Any, name: str) -> dict:
    role = _first(message, ROLE_FIELDS) if isinstance(message, dict) else None
    known = ROLE_NAMES.get(role, role) if isinstance(role, str) else None
    if known not in ROLES:
        raise ValueError(
            f"{name} is {shorten(message)}, not a message with one of the roles {', '.join(ROLES)}"
        )
    found: dict[str, Any] = {"role": known, "content": ""}
    content = _first(message, CONTENT_FIELDS)
    calls = _tool_calls(message, role, content, name)
    if calls:
        found["tool_calls"] = calls
        content = None if role == "function_call" else content
    reasoning = _first(message, REASONING_FIELDS)
    if reasoning is not None and str(reasoning).strip():
        found["reasoning_content"] = validate_text(reasoning, f"{name}.reasoning_content")
    found["content"] = _content(content, known, f"{name}.content", may_lack=bool(calls))
    for field in ("tool_call_id", "name"):
        if message.get(field) is not None:
            found[field] = str(message[field])
    if not _is_learned(message, name):
        found["learn"] = False
    return found


def _content(content: object, role: str, name: str, *, may_lack: bool) -> str:
    """Return the text of a message; content parts are joined."""
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}[{i}]") for i, part in enumerate(content))
    # An empty system message asks for no system prompt, since some templates bring their own. An
    # empty assistant message may have called a tool, and a tool may return nothing.
    if role != "user" and isinstance(content, str) and not content.strip():
        return content
    return validate_text(content, name)


def _part(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else None
    raise ValueError(
        f"{name} is {shorten(kind or part)}, and only parts of type text can be read; leave rows "
        "with images, audio or files out with --skip_bad_rows"
    )


def _tool_calls(message: dict, role: object, content: object, name: str) -> list[dict]:
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [{"function": message["function_call"]}]
    if role == "function_call":
        calls = [{"function": _parse_json(content)}]
    if not isinstance(calls, list):
        raise ValueError(f"{name}.tool_calls is {shorten(calls)}, not a list")
    return [_tool_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, name: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} is {shorten(call)}, not a call of a named function")
    # OpenAI's API gives the arguments as a string of JSON; templates expect the object.
    arguments = drop_nulls(_parse_json(function.get("arguments", {})))
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        found["id"] = str(call["id"])
    return found


def _parse_json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def drop_nulls(value: object) -> object:
    """Remove null fields of nested objects: an Arrow table gives every row the fields of all."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def _is_learned(message: dict, name: str) -> bool:
    """Return whether a turn may be learned, by OpenAI's weight (0 or 1) or the flag train."""
    weight = message.get("weight")
    if weight is None:
        weight = message.get("train")
    if weight is None:
        return True
    if weight not in (0, 1):
        raise ValueError(f"{name}.weight is {shorten(weight)}; a turn's weight is 0 or 1")
    return bool(weight)


def _first(item: dict, names: tuple[str, ...]) -> object:
    """Return the first field of `names` that is not null, or None."""
    return next((item[name] for name in names if item.get(name) is not None), None)
