"""Formats that render a row as text: plain, Human/Assistant, or the tokenizer's chat template."""

import re

import jinja2
from transformers import PreTrainedTokenizerBase

from dschat.data.row import Row, add_leading_space

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
IN_FORM = re.compile(r"\s*Human:.*Assistant:\s*", re.DOTALL)
# White space without line ends, since each line end may begin a turn itself: matching them here
# would make the time grow with the square of their number.
TURN = re.compile(r"(?:^|\n)[^\S\n]*(Human|Assistant):")
PROBE_ANSWER = "\ue000"  # of Unicode's private use: no template contains it


def render(
    row: Row, *, prompt_format: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str | None, str | None]:
    r"""Render a row as the texts that a model reads.

    Prompt and answer are joined without anything between them. No text ends with the tokenizer's
    end token.

    Args:
        row: prompt and answers.
        prompt_format: one of

            - "plain": prompt and answers unchanged.
            - "human_assistant": "\n\nHuman: ...\n\nAssistant:" and " answer". A prompt already in
              that form is unchanged.
            - "chat": the tokenizer's chat template with its generation prompt. A string prompt
              becomes the turns of a Human/Assistant text, or one message of the user.
            - "auto": messages use the chat template if the tokenizer has one, else
              human_assistant; strings are plain.
        tokenizer: has the chat template.

    Returns:
        The texts (prompt, chosen, rejected); an answer that the row lacks is None.

    Raises:
        ValueError: the format cannot show the row; names --prompt_format and the row's place.
    """
    is_text = isinstance(row.prompt, str)
    if prompt_format == "auto":
        prompt_format = _resolve_auto(is_text, tokenizer)
    if prompt_format == "plain":
        if not is_text:
            raise ValueError(
                f"{row.place or 'a row'}: --prompt_format plain cannot show messages; give auto or "
                "another format."
            )
        return row.prompt, row.chosen, row.rejected
    if prompt_format == "human_assistant":
        prompt = _render_human_assistant(row.prompt)
        return prompt, add_leading_space(row.chosen), add_leading_space(row.rejected)
    return _render_chat(row, tokenizer)


def parse_turns(text: str) -> list[dict]:
    """Parse a prompt into messages: the turns of a Human/Assistant text, or one user message."""
    if not IN_FORM.fullmatch(text):
        return [{"role": "user", "content": text.strip()}]
    text = text.rstrip().removesuffix("Assistant:")
    marks = list(TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {
            "role": "user" if mark.group(1) == "Human" else "assistant",
            "content": text[mark.end() : end].strip(),
        }
        for mark, end in zip(marks, ends, strict=False)
    ]


def _resolve_auto(is_text: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    if is_text:
        return "plain"
    return "chat" if tokenizer.chat_template else "human_assistant"


def _render_human_assistant(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt if IN_FORM.fullmatch(prompt) else f"{HUMAN} {prompt.strip()}{ASSISTANT}"
    # The form has no name for the system: its message comes without one.
    names = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
    text = ""
    for message in prompt:
        text += names[message["role"]] + message["content"].strip()
    return text + ASSISTANT


def _render_chat(
    row: Row, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str | None, str | None]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"--prompt_format chat: the tokenizer in {tokenizer.name_or_path or 'use'} has no chat "
            "template. Give human_assistant, plain or auto, or a model whose tokenizer has one."
        )
    messages = parse_turns(row.prompt) if isinstance(row.prompt, str) else row.prompt
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chosen = _render_chat_answer(messages, row.chosen, prompt, tokenizer)
        rejected = _render_chat_answer(messages, row.rejected, prompt, tokenizer)
    except Exception as error:  # a template is a program: it may divide by zero as well as refuse
        reason = str(error)
        if not isinstance(error, jinja2.TemplateError):
            reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{row.place or 'a row'}: the tokenizer's chat template refuses it ({reason}). "
            "Fix the row, remove it, or give --prompt_format human_assistant."
        ) from error
    return prompt, chosen, rejected


def _render_chat_answer(
    messages: list[dict], answer: str | None, prompt: str, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Return the answer with what the template writes before it, such as Llama-2's space."""
    if answer is None:
        return None
    answer = answer.strip()
    text = _render_turn(messages, answer, tokenizer)
    # The answer's words may occur in the template's own text, as "end" does in "<|im_end|>". A
    # second rendering with a character that no template contains shows where the answer begins.
    probe = _render_turn(messages, PROBE_ANSWER, tokenizer)
    head, found, _ = probe.removeprefix(prompt).partition(PROBE_ANSWER)
    # Some templates write a finished turn differently from the one they open, or drop or change its
    # content. Then the answer stays unchanged.
    if found and text.startswith(prompt + head + answer):
        return head + answer
    return answer


def _render_turn(messages: list[dict], answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    turns = [*messages, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False)
