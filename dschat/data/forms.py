r"""The forms in which rows come, and how each is read.

`FORMS` is the table: a row is read by the first form that it matches. To add a form, write a
function from a raw row to `Row`s and put it into the table.

Texts that are one instruction or question become a message of the user, so that a chat template can
show them. Prompts that are already a text to continue stay texts.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dschat.data.messages import (
    add_system,
    is_messages,
    normalize_messages,
    validate_messages,
)
from dschat.data.readers import BARE_TEXT
from dschat.data.row import Answer, Row, validate_pair
from dschat.data.templates import ASSISTANT
from dschat.data.text_checks import shorten, validate_text

# The errors of reading a row whose fields are missing, null, of another type or nested too deeply.
ROW_FAULTS = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
QUESTION_FIELDS = ("question", "query", "problem", "instruction", "input")
RESPONSE_FIELDS = ("response", "output", "answer", "solution", "completion")
SCORE_FIELDS = ("score", "rating", "overall_score", "reward")
ANSWER_TEXT_FIELDS = ("text", "answer", "content", "response", "completion")
LIST_FIELDS = ("completions", "answers", "responses")
CITATION = re.compile(r" ?[(\[].*?[)\]]")


@dataclass(frozen=True)
class Reading:
    """Options for reading raw rows: their columns, and the pairs made of ranked answers."""

    # Names of columns in place of the usual ones: {"prompt": "question", "chosen": "good"}.
    columns: dict[str, str] = field(default_factory=dict)
    pairs: str = "best_worst"  # of ranked answers: the best and the worst, all, or neighbours
    bare_text: str = "chosen"  # the part that a row of one text is: "chosen" or "prompt"
    min_margin: float = 0.0  # leave pairs out whose margin or difference of scores is less


@dataclass(frozen=True)
class Form:
    """One way in which datasets store a row."""

    name: str
    columns: str  # for the documentation and for messages
    matches: Callable[[dict], bool]
    read: Callable[[dict, Reading], list[Row]]


def read_rows(raw: dict, reading: Reading = Reading()) -> list[Row]:  # noqa: B008  frozen
    """Read a raw row as one `Row`, or as several if it holds ranked answers.

    A field that is null counts as missing.

    Raises:
        ValueError: no form fits, or a field is missing, wrongly typed or empty, or two answers are
            equal; says what to give instead.
    """
    raw = _rename(raw, reading.columns)
    form = _match(raw)
    rows = [validate_pair(row) for row in form.read(raw, reading)]
    return [row for row in rows if not _is_close(row, reading.min_margin)]


def read_row(raw: dict, reading: Reading = Reading()) -> Row:  # noqa: B008  frozen
    """Read a raw row as exactly one `Row`; see `read_rows`."""
    return read_rows(raw, replace(reading, pairs="best_worst", min_margin=0.0))[0]


def find_form(raw: dict, reading: Reading = Reading()) -> Form:  # noqa: B008  frozen
    """Return the form of a raw row.

    Raises:
        ValueError: none fits.
    """
    return _match(_rename(raw, reading.columns))


def _match(raw: dict) -> Form:
    for form in FORMS:
        if form.matches(raw):
            return form
    names = shorten(sorted(str(name) for name, value in raw.items() if value is not None))
    raise ValueError(
        f'no field "prompt" or "messages" among {names}, and no other known form. Name the columns '
        "with --prompt_key, --chosen_key, --rejected_key, --response_key or --messages_key"
    )


def _rename(raw: dict, columns: dict[str, str]) -> dict:
    """Give the columns that the user named their usual names; "a.b" is field b of column a."""
    if not columns:
        return raw
    taken = {name.partition(".")[0] for name in columns.values()}
    renamed = {name: value for name, value in raw.items() if name not in {*taken, *columns}}
    for usual, name in columns.items():
        value = raw
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(
                    f'no field "{name}", which --{usual}_key names, among '
                    f"{shorten(sorted(map(str, raw)))}"
                )
            value = value[part]
        renamed[usual] = value
    return renamed


def _is_close(row: Row, min_margin: float) -> bool:
    if min_margin <= 0 or row.rejected is None:
        return False
    margin = row.margin
    if margin is None:
        chosen = row.columns.get("score_chosen")
        rejected = row.columns.get("score_rejected")
        if not _is_number(chosen) or not _is_number(rejected):
            return False
        margin = chosen - rejected
    return margin < min_margin


def _build(
    raw: dict,
    used: Sequence[str],
    prompt: str | list[dict],
    chosen: Answer | None = None,
    rejected: Answer | None = None,
) -> Row:
    """Build a row, with the columns that any form may have: system, tools and margin."""
    columns = {name: value for name, value in raw.items() if name not in used}
    system = columns.pop("system", None)
    if system is None:
        system = columns.pop("system_prompt", None)
    if system is not None and str(system).strip():
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        prompt = add_system(prompt, system)
    tools = _tools(columns.pop("tools", None))
    margin = columns.pop("margin", None)
    if margin is not None and not _is_number(margin):
        raise ValueError(f'field "margin" is {shorten(margin)}, not a number')
    return Row(prompt, chosen, rejected, columns, tools=tools, margin=margin)


def _tools(tools: object) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise ValueError(f'field "tools" is {shorten(tools)}, not JSON') from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f'field "tools" is {shorten(tools)}, not a list of functions')
    return tools


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _has(*names: str) -> Callable[[dict], bool]:
    def has(raw: dict) -> bool:
        return None not in map(raw.get, names)

    return has


def _field(raw: dict, names: Sequence[str]) -> str | None:
    """Return the first of `names` whose field is not null."""
    for name in names:
        if raw.get(name) is not None:
            return name
    return None


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _answer(value: object, name: str) -> Answer | None:
    """Read an answer: a text, a message, or messages that begin with the assistant's."""
    if value is None:
        return None
    is_list = isinstance(value, list) and value and isinstance(value[0], dict)
    is_message = isinstance(value, dict) and is_messages([value])
    if not is_list and not is_message:
        return validate_text(value, name)
    return _as_answer(normalize_messages([value] if isinstance(value, dict) else value, name), name)


def _as_answer(messages: list[dict], name: str, *, begin: int = 0) -> Answer:
    """Return normalized messages as an answer; a single one that is only words becomes a text.

    Args:
        messages: the answer.
        name: the field's name, for messages to the user.
        begin: number of the first message in that field.
    """
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise ValueError(
            f'field "{name}" does not begin and end with a message of the assistant: '
            f"{shorten(messages)}"
        )
    for number, message in enumerate(messages, begin):
        if "tool_calls" not in message:
            validate_text(message["content"], f"{name}[{number}].content")
    is_text = len(messages) == 1 and set(messages[0]) == {"role", "content"}
    return messages[0]["content"] if is_text else messages


def _prompt(value: object, name: str) -> str | list[dict]:
    if value == "":  # an answer to nothing can be learned, and steps that need a prompt check it
        return ""
    return validate_messages(value, name) if isinstance(value, list) else validate_text(value, name)


def _split(messages: list[dict], name: str) -> tuple[list[dict], Answer | None]:
    """Split a conversation into the prompt and the assistant's last message, None without one."""
    if messages[-1]["role"] != "assistant":
        return validate_messages(messages, name), None
    before = messages[:-1]
    if not before:
        raise ValueError(f'field "{name}" begins with the answer; it needs a message of the user')
    return before, _as_answer(messages[-1:], name, begin=len(before))


def _is_dialogue(value: Any) -> bool:
    """Return whether `value` is a conversation that does not begin with the assistant."""
    if not is_messages(value):
        return False
    return normalize_messages(value[:1], "chosen")[0]["role"] != "assistant"


def _dialogue_pair(raw: dict, reading: Reading) -> list[Row]:
    chosen = normalize_messages(raw["chosen"], "chosen")
    used = ("chosen", "rejected", "prompt", "messages", "prompt_id")
    if raw.get("rejected") is None:
        prompt, answer = _split(chosen, "chosen")
        if answer is None:
            raise ValueError(f'field "chosen" does not end with an answer: {shorten(chosen[-1])}')
        return [_build(raw, used, prompt, answer)]
    rejected = normalize_messages(raw["rejected"], "rejected")
    most = min(len(chosen), len(rejected)) - 1
    common = 0
    while common < most and chosen[common] == rejected[common]:
        common += 1
    while common and chosen[common - 1]["role"] not in ("user", "tool"):
        common -= 1
    if not common:
        raise ValueError(
            f'fields "chosen" and "rejected" have no prompt in common: {shorten(chosen[0])} and '
            f"{shorten(rejected[0])}"
        )
    answers = [
        _as_answer(messages[common:], name, begin=common)
        for messages, name in ((chosen, "chosen"), (rejected, "rejected"))
    ]
    return [_build(raw, used, chosen[:common], *answers)]


def _transcript_pair(raw: dict, reading: Reading) -> list[Row]:
    chosen = validate_text(raw["chosen"], "chosen")
    rejected = validate_text(raw["rejected"], "rejected")
    end = chosen.rfind(ASSISTANT, 0, _common_length(chosen, rejected))
    if end < 0:
        raise ValueError(
            'fields "chosen" and "rejected" without a prompt: give a field "prompt", name another '
            "field with --prompt_key, or give whole "
            r'dialogues ("\n\nHuman: ...\n\nAssistant: ...") with a common beginning'
        )
    end += len(ASSISTANT)
    answers = (validate_text(chosen[end:], "chosen"), validate_text(rejected[end:], "rejected"))
    return [_build(raw, ("chosen", "rejected"), chosen[:end], *answers)]


def _common_length(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts, by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _messages(raw: dict, reading: Reading) -> list[Row]:
    name = _field(raw, ("messages", "conversations", "conversation"))
    messages = normalize_messages(raw[name], name)
    rejected = _answer(raw.get("rejected"), "rejected")
    if raw.get("chosen") is not None:
        prompt = validate_messages(raw[name], name)
        chosen = _answer(raw["chosen"], "chosen")
        return [_build(raw, (name, "chosen", "rejected"), prompt, chosen, rejected)]
    prompt, chosen = _split(messages, name)
    # Chat sets repeat the first question in a column prompt.
    used = [name, "rejected"]
    if isinstance(raw.get("prompt"), str):
        used.append("prompt")
    return [_build(raw, used, prompt, chosen, rejected)]


def _prompt_pair(raw: dict, reading: Reading) -> list[Row]:
    name = _field(raw, ("chosen", "response", "completion"))
    prompt = _prompt(raw["prompt"], "prompt")
    chosen = _answer(raw.get(name), name) if name else None
    rejected = _answer(raw.get("rejected"), "rejected")
    if chosen is not None and rejected is None and raw.get("label") in (False, 0):
        # An unpaired preference: this answer is a bad one, and must not be learned as a good one.
        chosen = None
    return [_build(raw, ("prompt", name, "rejected"), prompt, chosen, rejected)]


def _instruction(raw: dict, reading: Reading) -> list[Row]:
    text = validate_text(raw["instruction"], "instruction")
    more = _field(raw, ("input", "context"))
    if more and str(raw[more]).strip():
        text = f"{text}\n\n{validate_text(raw[more], more)}"
    name = _field(raw, ("chosen", "output", "response"))
    answers = (
        _answer(raw.get(name), name) if name else None,
        _answer(raw.get("rejected"), "rejected"),
    )
    return [_build(raw, ("instruction", more, name, "rejected"), _user(text), *answers)]


def _question(raw: dict, reading: Reading) -> list[Row]:
    question = _field(raw, QUESTION_FIELDS)
    if isinstance(raw[question], list):
        prompt = validate_messages(raw[question], question)
    else:
        prompt = _user(validate_text(raw[question], question))
    name = _field(raw, ("chosen", *RESPONSE_FIELDS))
    answers = (
        _answer(raw.get(name), name) if name else None,
        _answer(raw.get("rejected"), "rejected"),
    )
    used = [question, "rejected"]
    # The answer stays a column too: rewards by a function compare with it.
    if name in ("chosen", "response", "output"):
        used.append(name)
    return [_build(raw, used, prompt, *answers)]


def _text(raw: dict, reading: Reading) -> list[Row]:
    return [_build(raw, ("text",), "", validate_text(raw["text"], "text"))]


def _bare_text(raw: dict, reading: Reading) -> list[Row]:
    text = validate_text(raw[BARE_TEXT], "text")
    return [Row(text) if reading.bare_text == "prompt" else Row("", text)]


def _summaries(raw: dict, reading: Reading) -> list[Row]:
    text = _field(raw["info"], ("post", "article"))
    prompt = validate_text(raw["info"][text], f"info.{text}")
    title = raw["info"].get("title")
    if title:
        prompt = f"{title}\n\n{prompt}"
    texts = [summary["text"] for summary in raw["summaries"]]
    chosen = validate_text(texts[raw["choice"]], "summaries.text")
    rejected = validate_text(texts[1 - raw["choice"]], "summaries.text")
    return [_build(raw, ("info", "summaries", "choice"), f"{prompt}\n\nTL;DR:", chosen, rejected)]


def _ranked(
    raw: dict,
    used: Sequence[str],
    prompt: str | list[dict],
    answers: Sequence[tuple[Answer, float]],
    rule: str,
) -> list[Row]:
    """Build the pairs of one prompt's answers.

    Args:
        raw: the raw row.
        used: its columns that are not kept.
        prompt: the prompt.
        answers: each with its score; higher is better. Equal scores make no pair.
        rule: a value of --pairs.
    """
    order = sorted(answers, key=lambda answer: -answer[1])
    if rule == "all":
        pairs = [(i, j) for i in range(len(order)) for j in range(i + 1, len(order))]
    elif rule == "adjacent":
        pairs = [(i, i + 1) for i in range(len(order) - 1)]
    else:
        pairs = [(0, len(order) - 1)] if len(order) > 1 else []
    rows = []
    for i, j in pairs:
        (better, high), (worse, low) = order[i], order[j]
        if high > low and better != worse:
            row = _build(raw, used, prompt, better, worse)
            scores = {"score_chosen": high, "score_rejected": low}
            rows.append(replace(row, columns={**row.columns, **scores}))
    if not rows and order:
        rows = [_build(raw, used, prompt, order[0][0])]
    return rows


def _any_prompt(raw: dict) -> tuple[str, str | list[dict]]:
    """Return the name and the prompt of a row of ranked answers."""
    name = _field(raw, ("prompt", "context", "history", "post", *QUESTION_FIELDS))
    if name is None:
        raise ValueError('no field "prompt" beside the answers; name it with --prompt_key')
    value = raw[name]
    if name == "question" and isinstance(value, dict):
        value = value.get("full_text")
    if isinstance(value, str) and ASSISTANT not in value:
        return name, _user(validate_text(value, name))
    return name, _prompt(value, name)


def _answer_list(raw: dict, reading: Reading) -> list[Row]:
    name = _field(raw, LIST_FIELDS)
    prompt_name, prompt = _any_prompt(raw)
    outside = _field(raw, ("scores", "ratings", "ranks"))
    answers = []
    for i, item in enumerate(raw[name]):
        text = item
        score = raw[outside][i] if outside else None
        if outside == "ranks":
            score = -score
        if isinstance(item, dict):
            text = item[_field(item, ANSWER_TEXT_FIELDS)]
            if score is None:
                score = _item_score(item)
        if not _is_number(score):
            raise ValueError(f"{name}[{i}] has no rank and no score: {shorten(item)}")
        answers.append((_answer(text, f"{name}[{i}]"), score))
    return _ranked(raw, (name, prompt_name, outside), prompt, answers, reading.pairs)


def _item_score(item: dict) -> float | None:
    """Return an answer's score; a rank counts downwards, as 0 or 1 is the best."""
    if item.get("rank") is not None:
        return -item["rank"]
    name = _field(item, SCORE_FIELDS)
    value = item[name] if name else None
    return float(value) if isinstance(value, str) and value.strip() else value


def _is_answer_list(raw: dict) -> bool:
    name = _field(raw, LIST_FIELDS)
    items = raw[name] if name else None
    if not isinstance(items, list) or not items:
        return False
    if _field(raw, ("scores", "ratings", "ranks")):
        return True
    return isinstance(items[0], dict) and _item_score(items[0]) is not None


# Two answers in two columns: their names, the column that judges, and who wins by its value.
# 1: the first answer, -1: the second, 0: neither.
TWO_ANSWERS: tuple[tuple[str, str, str, Callable[[Any], float]], ...] = (
    ("response_0", "response_1", "better_response_id", lambda value: 1 - 2 * int(value)),
    ("response1", "response2", "overall_preference", lambda value: -float(value)),
    ("response_1", "response_2", "preference_strength", lambda value: -float(value)),
    ("human_ref_A", "human_ref_B", "labels", lambda value: 2 * int(value) - 1),
    ("response_a", "response_b", "winner", lambda value: _winner(value)),
    ("conversation_a", "conversation_b", "winner", lambda value: _winner(value)),
)


def _winner(value: object) -> int:
    """Return 1 if an arena's vote is for model a, -1 for model b, else 0."""
    word = str(value).lower()
    if word in ("model_a", "a"):
        return 1
    return -1 if word in ("model_b", "b") else 0


def _find_two_answers(raw: dict) -> tuple | None:
    for entry in TWO_ANSWERS:
        if None not in map(raw.get, entry[:3]):
            return entry
    return None


def _two_answers(raw: dict, reading: Reading) -> list[Row]:
    first, second, judge, verdict = _find_two_answers(raw)
    difference = verdict(raw[judge])
    scored = (difference, 0.0) if difference >= 0 else (0.0, -difference)
    if first == "conversation_a":
        dialogues = [normalize_messages(raw[name], name) for name in (first, second)]
        if difference < 0:
            dialogues.reverse()
        chosen, rejected = dialogues
        pair = {**raw, "chosen": chosen, "rejected": rejected if difference else None}
        pair = {name: value for name, value in pair.items() if name not in (first, second, judge)}
        return _dialogue_pair(pair, reading)
    prompt_name, prompt = _any_prompt(raw)
    answers = [
        (_answer(raw[name], name), score)
        for name, score in zip((first, second), scored, strict=True)
    ]
    return _ranked(raw, (first, second, judge, prompt_name), prompt, answers, reading.pairs)


def _webgpt(raw: dict, reading: Reading) -> list[Row]:
    names = ("answer_0", "answer_1")
    answers = [
        (validate_text(CITATION.sub("", raw[name]), name), raw[f"score_{i}"])
        for i, name in enumerate(names)
    ]
    prompt_name, prompt = _any_prompt(raw)
    used = (*names, prompt_name, "score_0", "score_1")
    return _ranked(raw, used, prompt, answers, reading.pairs)


def _tree(raw: dict, reading: Reading) -> list[Row]:
    """Read a tree of OpenAssistant: the replies to each message of a user are ranked answers."""
    rows: list[Row] = []
    open_nodes: list[tuple[dict, list[dict]]] = [(raw["prompt"], [])]
    while open_nodes:
        node, before = open_nodes.pop()
        role = "assistant" if node.get("role") == "assistant" else "user"
        messages = [*before, {"role": role, "content": validate_text(node["text"], "text")}]
        replies = node.get("replies") or []
        open_nodes += [(reply, messages) for reply in reversed(replies)]
        if role == "user":
            ranked = [
                (validate_text(reply["text"], "text"), -reply["rank"])
                for reply in replies
                if _is_number(reply.get("rank"))
            ]
            if not ranked and replies:
                ranked = [(validate_text(replies[0]["text"], "text"), 0)]
            rows += _ranked(raw, tuple(raw), messages, ranked, reading.pairs)
    if not rows:
        raise ValueError("a tree of messages without an answer")
    return rows


def _is_tree(raw: dict) -> bool:
    prompt = raw.get("prompt")
    return isinstance(prompt, dict) and "text" in prompt and "replies" in prompt


def _is_dialogue_pair(raw: dict) -> bool:
    return _is_dialogue(raw.get("chosen"))


def _is_summaries(raw: dict) -> bool:
    return _has("info", "summaries", "choice")(raw) and isinstance(raw["info"], dict)


def _is_two_answers(raw: dict) -> bool:
    return _find_two_answers(raw) is not None


def _is_messages(raw: dict) -> bool:
    return _field(raw, ("messages", "conversations", "conversation")) is not None


def _is_transcript_pair(raw: dict) -> bool:
    both = isinstance(raw.get("chosen"), str) and isinstance(raw.get("rejected"), str)
    return both and _field(raw, ("prompt", *QUESTION_FIELDS)) is None


def _is_question(raw: dict) -> bool:
    name = _field(raw, QUESTION_FIELDS)
    # Beside a whole text, an input is a part of it.
    return name is not None and (name != "input" or raw.get("text") is None)


FORMS: tuple[Form, ...] = (
    Form("OpenAssistant tree", "prompt: {text, replies: [{text, rank}]}", _is_tree, _tree),
    Form(
        "dialogue pair",
        "chosen, rejected: whole dialogues as messages; their common beginning is the prompt",
        _is_dialogue_pair,
        _dialogue_pair,
    ),
    Form(
        "summaries",
        "info.post, summaries: [{text}, {text}], choice: 0 or 1",
        _is_summaries,
        _summaries,
    ),
    Form(
        "scored answers",
        "question.full_text, answer_0, answer_1, score_0, score_1",
        _has("answer_0", "answer_1", "score_0", "score_1"),
        _webgpt,
    ),
    Form(
        "two answers",
        "; ".join(f"{first}, {second}, {judge}" for first, second, judge, _ in TWO_ANSWERS),
        _is_two_answers,
        _two_answers,
    ),
    Form(
        "ranked answers",
        "prompt, and completions, answers or responses with scores or ranks",
        _is_answer_list,
        _answer_list,
    ),
    Form(
        "messages",
        "messages: [{role, content}] or conversations: [{from, value}]; may have chosen, rejected",
        _is_messages,
        _messages,
    ),
    Form(
        "prompt",
        "prompt, with chosen, response or completion, and rejected; texts or messages",
        _has("prompt"),
        _prompt_pair,
    ),
    Form(
        "transcript pair",
        r"chosen, rejected: texts of '\n\nHuman: ...\n\nAssistant: ...'",
        _is_transcript_pair,
        _transcript_pair,
    ),
    Form(
        "instruction",
        "instruction, input or context, with output, response, or chosen and rejected",
        _has("instruction"),
        _instruction,
    ),
    Form(
        "question",
        "question, query, problem, input; with answer, response, solution, or chosen and rejected",
        _is_question,
        _question,
    ),
    Form("text", "text: a whole text, all of it learned", _has("text"), _text),
    Form("line of text", "a JSON string in place of an object", _has(BARE_TEXT), _bare_text),
)
