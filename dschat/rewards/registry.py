"""The names of graders, and how --reward_fn gives them options."""

import ast
from collections.abc import Callable

from dschat.rewards.graders import (
    ExactMatch,
    JsonSchema,
    LengthPenalty,
    MathMatch,
    NumericMatch,
    RegexMatch,
    ValidJson,
)
from dschat.rewards.remote import LanguageModelJudge, ScoringServer

GRADERS: dict[str, Callable] = {
    "exact_match": ExactMatch,
    "numeric_match": NumericMatch,
    "math_match": MathMatch,
    "regex_match": RegexMatch,
    "valid_json": ValidJson,
    "json_schema": JsonSchema,
    "length_penalty": LengthPenalty,
    "scoring_server": ScoringServer,
    "llm_judge": LanguageModelJudge,
}


def load_grader(text: str) -> Callable:
    """Return the grader that `text` names: "numeric_match", "length_penalty(limit=200)".

    Options are numbers, texts, lists, True and False, as in Python.

    Raises:
        ValueError: there is no such grader, or it does not take these options.
    """
    name, options = _parse(text)
    if name not in GRADERS:
        raise ValueError(
            f"there is no grader {name}. Take one of {', '.join(GRADERS)}, or name a function: "
            "file.py:function."
        )
    try:
        return GRADERS[name](**options)
    except TypeError as error:  # an unknown option, a missing one, or one of another type
        raise ValueError(f"{name} does not take these options: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{error}.") from error


def _parse(text: str) -> tuple[str, dict]:
    """Return the name and the options of "name" or "name(option=value, ...)"."""
    if "(" not in text:
        return text, {}
    example = "length_penalty(limit=200)"
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"expected a name with options, like {example}.") from error
    return call.func.id, options
