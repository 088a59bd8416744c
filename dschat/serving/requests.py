"""Requests to the chat server: their fields, and what each may be."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from dschat.data.messages import validate_messages
from dschat.data.text_checks import validate_text
from dschat.serving.answering import Settings
from dschat.serving.guard import RequestError
from dschat.serving.votes import NO_WINNER, Vote, Voted

# The settings of sampling, with the lowest and the highest value; whole numbers have ints.
SAMPLING = {
    "temperature": (0.0, 10.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "seed": (0, 2**63 - 1),
}
SETTINGS = ("max_new_tokens", *SAMPLING)
MAX_ENDS = 4  # texts that end an answer, as in OpenAI's API
MAX_END_CHARACTERS = 200


@dataclass(frozen=True)
class Bounds:
    """Limits and defaults of a request."""

    models: tuple[str, ...]
    max_turns: int
    settings: Settings  # max_new_tokens is also the most


@dataclass(frozen=True)
class Request:
    """A conversation for one or more models."""

    models: tuple[str, ...]
    messages: list[dict]
    settings: Settings


def read_request(fields: dict, bounds: Bounds) -> Request:
    """Check a request of the page or of POST /chat.

    Args:
        fields: {"messages": [{"role": "user", "content": "..."}, ...]}, and optionally "models" (a
            list of names; default: the first) and the names of SETTINGS.
        bounds: what it may ask for.

    Raises:
        ValueError: the request is not valid; the message says why.
    """
    known = ("messages", "models", *SETTINGS)
    refuse_unknown(fields, known)
    models = fields.get("models", [bounds.models[0]])
    if not isinstance(models, list) or not 1 <= len(models) <= len(bounds.models):
        raise ValueError(f"models is {_short(models)}; give a list of 1 to {len(bounds.models)}")
    for name in models:
        if name not in bounds.models:
            raise ValueError(f"no model {_short(name)}; there is {', '.join(bounds.models)}")
    return Request(tuple(models), read_messages(fields, bounds), read_settings(fields, bounds))


def read_chat_completion(fields: dict, bounds: Bounds) -> Request:
    """Check a request of OpenAI's POST /v1/chat/completions.

    Fields that would change the answer and are not supported are refused; others are ignored.

    Raises:
        ValueError: the request is not valid; the message says why.
        RequestError: there is no such model (404).
    """
    name = fields.get("model", bounds.models[0])
    if name not in bounds.models:
        raise RequestError(404, f"no model {_short(name)}; there is {', '.join(bounds.models)}")
    for field in ("tools", "functions", "logprobs", "logit_bias", "audio"):
        if fields.get(field):
            raise ValueError(f"{field} is not supported; leave it out")
    if fields.get("n") not in (None, 1):
        raise ValueError(f"n is {_short(fields['n'])}, and only 1 is supported")
    kind = fields.get("response_format")
    if kind not in (None, {"type": "text"}):
        raise ValueError('response_format is not supported except {"type": "text"}')
    if type(fields.get("stream", False)) is not bool:
        raise ValueError(f"stream is {_short(fields['stream'])}; give true or false")
    renamed = {name: value for name, value in fields.items() if value is not None}
    for field in ("max_tokens", "max_completion_tokens"):
        if field in renamed:
            renamed["max_new_tokens"] = renamed[field]
    settings = replace(read_settings(renamed, bounds), ends=_read_ends(renamed.get("stop", [])))
    return Request((name,), read_messages(fields, bounds), settings)


def read_vote(fields: dict, bounds: Bounds) -> Vote:
    """Check a vote of the page.

    Args:
        fields: {"messages": [...], "answers": [{"model", "text", "score"}, ...], "best": 0}, with
            "best" the number of an answer, "tie" or "bad", and the names of SETTINGS.
        bounds: the names of the models, and the most turns.

    Returns:
        The vote, still without the models' paths.

    Raises:
        ValueError: the vote is not valid; the message says why.
    """
    refuse_unknown(fields, ("messages", "answers", "best", *SETTINGS))
    messages = read_messages(fields, bounds)
    settings = read_settings(fields, bounds)
    shown = {"max_new_tokens": settings.max_new_tokens, **vars(settings.sampling)}
    answers = fields.get("answers")
    if not isinstance(answers, list) or not 2 <= len(answers) <= 3:
        raise ValueError(f"answers is {_short(answers)}; give a list of 2 or 3")
    voted = tuple(_read_voted(answer, bounds, shown) for answer in answers)
    best = fields.get("best")
    if best not in NO_WINNER:
        if type(best) is not int or not 0 <= best < len(voted):
            raise ValueError(f"best is {_short(best)}; give the number of an answer, tie or bad")
        if len({answer.text for answer in voted}) == 1:
            raise ValueError("the answers are the same; vote for a tie")
    return Vote(messages, voted, best)


def _read_voted(answer: object, bounds: Bounds, settings: dict) -> Voted:
    if not isinstance(answer, dict):
        raise ValueError(f"an answer is {_short(answer)}, not an object")
    refuse_unknown(answer, ("model", "text", "score"))
    name = answer.get("model")
    if name not in bounds.models:
        raise ValueError(f"no model {_short(name)}; there is {', '.join(bounds.models)}")
    score = answer.get("score")
    if score is not None and not _is_number(score):
        raise ValueError(f"score is {_short(score)}, not a number")
    text = validate_text(answer.get("text"), "answers.text")
    return Voted(name, "", text, score, settings)


def read_messages(fields: dict, bounds: Bounds) -> list[dict]:
    """Return the conversation of a request.

    Raises:
        ValueError: there is none, or it is too long.
    """
    if "messages" not in fields:
        raise ValueError('no field "messages"')
    messages = validate_messages(fields["messages"], "messages")
    num_system = sum(message["role"] == "system" for message in messages)
    if len(messages) - num_system > 2 * bounds.max_turns or num_system > 1:
        raise ValueError(
            f"{len(messages)} messages, {num_system} of them from the system: at most "
            f"{2 * bounds.max_turns} (--max_turns {bounds.max_turns}) and 1 from the system are "
            "allowed. Begin a new conversation."
        )
    return messages


def read_settings(fields: dict, bounds: Bounds) -> Settings:
    """Return the settings of a request; what it leaves open is as the flags say.

    Raises:
        ValueError: a setting is out of its range.
    """
    most = bounds.settings.max_new_tokens
    number = fields.get("max_new_tokens", most)
    # bool is a subclass of int, and true is no number of tokens.
    if type(number) is not int or not 1 <= number <= most:
        raise ValueError(
            f"max_new_tokens is {_short(number)}; give a whole number from 1 to {most}"
        )
    given = {name: _read_number(fields, name) for name in SAMPLING if name in fields}
    return Settings(number, replace(bounds.settings.sampling, **given))


def _read_number(fields: dict, name: str) -> Any:
    low, high = SAMPLING[name]
    value = fields[name]
    is_whole = isinstance(low, int)
    fits = type(value) is int if is_whole else _is_number(value)
    if not fits or not low <= value <= high or (name == "top_p" and value == 0):
        kind = "whole number" if is_whole else "number"
        raise ValueError(f"{name} is {_short(value)}; give a {kind} from {low} to {high}")
    return value


def _read_ends(ends: object) -> tuple[str, ...]:
    texts = [ends] if isinstance(ends, str) else ends
    if not isinstance(texts, list) or len(texts) > MAX_ENDS:
        raise ValueError(f"stop is {_short(ends)}; give a text, or at most {MAX_ENDS}")
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_END_CHARACTERS:
            raise ValueError(
                f"stop has {_short(text)}; give texts of 1 to {MAX_END_CHARACTERS} characters"
            )
    return tuple(texts)


def refuse_unknown(fields: dict, known: tuple[str, ...]) -> None:
    """Raise ValueError if an object has a field that is not `known`."""
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown field {unknown[0][:80]!r}; known: {', '.join(known)}")


def _is_number(value: object) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _short(value: object) -> str:
    return json.dumps(value)[:40]
