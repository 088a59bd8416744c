"""A row to the texts that a model reads: as it stands, Human/Assistant, or the tokenizer's chat template."""

import re

import jinja2
from transformers import PreTrainedTokenizerBase

from dschat.data.row import Row

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
IN_FORM = re.compile(r"\s*Human:.*Assistant:\s*", re.DOTALL)
# White space without line ends, each of which may begin a turn itself: with them the time grows with their square.
TURN = re.compile(r"(?:^|\n)[^\S\n]*(Human|Assistant):")
OTHER_ANSWER = "\ue000"  # of Unicode's private use: no template has it


def render(
    row: Row, *, prompt_format: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str | None, str | None]:
    """The texts (prompt, chosen, rejected) of a row; an answer that the row lacks is None.

    Prompt and answer are made to be joined as they stand. No text ends with the tokenizer's end token.

    Args:
        row: prompt and answers.
        prompt_format: "plain": both as they stand. "human_assistant": "\\n\\nHuman: ...\\n\\nAssistant:" and " answer";
            a text in that form already stays. "chat": the tokenizer's chat template with its generation prompt; a text
            is one message of the user, or the turns of a Human/Assistant text. "auto": messages take the chat
            template if the tokenizer has one, else human_assistant; texts are plain.

    Raises:
        ValueError: if the format cannot show the row; names --prompt_format and the row's place.
    """
    is_text = isinstance(row.prompt, str)
    if prompt_format == "auto":
        prompt_format = (
            "plain" if is_text else "chat" if tokenizer.chat_template else "human_assistant"
        )
    if prompt_format == "plain":
        if not is_text:
            raise ValueError(
                f"{row.place or 'a row'}: --prompt_format plain cannot show messages; give auto or another."
            )
        return row.prompt, row.chosen, row.rejected
    if prompt_format == "human_assistant":
        prompt = _human_assistant(row.prompt)
        return prompt, _with_space(row.chosen), _with_space(row.rejected)
    return _chat(row, tokenizer)


def parse_turns(text: str) -> list[dict]:
    """The messages of a prompt: the turns of a Human/Assistant text, or one message of the user."""
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
        for mark, end in zip(marks, ends)
    ]


def _human_assistant(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt if IN_FORM.fullmatch(prompt) else f"{HUMAN} {prompt.strip()}{ASSISTANT}"
    text = ""
    for message in prompt:
        content = message["content"].strip()
        # The form has no name for the system: its message stands in front by itself.
        name = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}[message["role"]]
        text += name + content
    return text + ASSISTANT


def _with_space(answer: str | None) -> str | None:
    return answer if answer is None or answer[0].isspace() else " " + answer


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None, str | None]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"--prompt_format chat: the tokenizer in {tokenizer.name_or_path or 'use'} has no chat template. Give "
            "human_assistant, plain or auto, or a model whose tokenizer has one."
        )
    messages = parse_turns(row.prompt) if isinstance(row.prompt, str) else row.prompt
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answers = [
            None if answer is None else _chat_answer(messages, answer.strip(), prompt, tokenizer)
            for answer in (row.chosen, row.rejected)
        ]
    except Exception as error:  # a template is a program: it may divide by zero as well as refuse
        reason = (
            str(error)
            if isinstance(error, jinja2.TemplateError)
            else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"{row.place or 'a row'}: the tokenizer's chat template refuses it ({reason}). Mend the row, leave it out, "
            "or give --prompt_format human_assistant."
        ) from error
    return prompt, *answers


def _chat_answer(
    messages: list[dict], answer: str, prompt: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """What the template writes between the generation prompt and the end of the answer, such as Llama-2's space."""
    text, other = (
        tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": content}], tokenize=False
        )
        for content in (answer, OTHER_ANSWER)
    )
    # The answer's words may stand in the template's own, as "end" does in "<|im_end|>": another answer tells them apart.
    head, found, _ = other.removeprefix(prompt).partition(OTHER_ANSWER)
    # Some templates write a finished turn otherwise than they open one, or leave out or change what is in it: then the
    # answer as it stands.
    return head + answer if found and text.startswith(prompt + head + answer) else answer
