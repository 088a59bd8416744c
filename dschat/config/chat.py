"""The configuration of the chat program."""

from dataclasses import dataclass, fields
from typing import Any

from dschat.config.eval_tools import InferenceModel
from dschat.config.options import PromptFormat, flag
from dschat.config.value_checks import (
    above,
    at_least,
    fields_at_least,
    in_range,
    required,
    seed_value,
    share,
)


@dataclass(frozen=True)
class ChatModelOptions(InferenceModel):
    """The model to talk to."""

    path: str = flag(
        "",
        "The model to talk to: the output folder of step 1, OUTPUT/actor of step 3, or a hub id. "
        "Required.",
    )


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated, and how long a conversation may be."""

    _argument_group_name = "answers"

    max_new_tokens: int = flag(
        128, "Most tokens of an answer. With --serve, a request may ask for fewer."
    )
    temperature: float = flag(0.0, "Sampling temperature; 0: always take the likeliest token.")
    top_k: int = flag(0, "Sample from this many likeliest tokens; 0: from all.")
    top_p: float = flag(
        1.0, "Sample from the likeliest tokens that together have this probability; 1: from all."
    )
    repetition_penalty: float = flag(
        1.0, "Above 1: tokens that have occurred before become less likely."
    )
    seed: int = flag(1234, "Seed of sampling.")
    prompt_format: PromptFormat = flag(
        "auto",
        "Text format of the conversation: chat (the tokenizer's chat template), human_assistant, "
        "plain (the unchanged text, which the model continues), or auto (the chat template if the "
        "tokenizer has one, else human_assistant).",
    )
    max_prompt_seq_len: int = flag(
        1024,
        "Longest conversation in tokens, at most what the model has positions for. The oldest "
        "turns are dropped first.",
    )
    max_turns: int = flag(
        32,
        "Turns of a conversation. The terminal forgets older ones; with --serve, a request with "
        "more is refused.",
    )


@dataclass(frozen=True)
class Serving:
    """The HTTP server and its limits."""

    _argument_group_name = "serving"

    serve: bool = flag(
        False, "Answer over HTTP (a page and POST /chat) instead of in the terminal."
    )
    host: str = flag(
        "127.0.0.1", "Address to listen on. The default can be reached from this machine only."
    )
    port: int = flag(8000, "Port to listen on; 0: any free port.")
    max_request_bytes: int = flag(65536, "Refuse requests larger than this (413).")
    requests_per_minute: int = flag(
        30, "Refuse more requests than this from one address within a minute (429)."
    )
    max_wait_s: float = flag(
        30.0, "Refuse a request that waits longer than this for its turn (503)."
    )


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model."""

    model: ChatModelOptions
    answers: AnswerOptions
    serving: Serving

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = required("--path", self.model.path)
        limits = ("max_new_tokens", "max_prompt_seq_len", "max_turns")
        found += fields_at_least(self.answers, limits, 1)
        found += fields_at_least(self.answers, ("temperature", "top_k"), 0)
        found += share("--top_p", self.answers.top_p, 1.0)
        found += seed_value("--seed", self.answers.seed)
        found += above("--repetition_penalty", self.answers.repetition_penalty, 0.0)
        found += in_range("--port", self.serving.port, 0, 65535)
        found += fields_at_least(self.serving, ("max_request_bytes", "requests_per_minute"), 1)
        return found + at_least("--max_wait_s", self.serving.max_wait_s, 0)

    def without_effect(self) -> list[str]:
        """Return a sentence for each given flag that has no effect."""
        found = []
        if self.answers.temperature == 0:
            for text in _changed(self.answers, ("top_k", "top_p")):
                found.append(f"{text} has no effect at --temperature 0")
        if not self.serving.serve:
            names = tuple(option.name for option in fields(Serving))
            for text in _changed(self.serving, names):
                found.append(f"{text} has no effect without --serve")
        return found


def _changed(options: Any, names: tuple[str, ...]) -> list[str]:
    """Return flag and value of each option in `names` that differs from its default."""
    defaults = {option.name: option.default for option in fields(options)}
    return [
        f"--{name} {getattr(options, name)}"
        for name in names
        if getattr(options, name) != defaults[name]
    ]
