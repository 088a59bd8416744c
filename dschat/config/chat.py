"""The configuration of the chat program."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

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

MAX_MODELS = 3  # side by side


@dataclass(frozen=True)
class ChatModelOptions(InferenceModel):
    """The model to talk to."""

    path: str = flag(
        "",
        "The model to talk to: the output folder of step 1, OUTPUT/actor of step 3, or a hub id. "
        "Required, unless --models names models.",
    )
    models: list[str] = flag(
        [],
        "With --serve, one to three models side by side, as NAME=PATH: base=facebook/opt-350m "
        "sft=output/sft rlhf=output/ppo/actor.",
    )
    reward_model: Optional[str] = flag(
        None, "With --serve, show this reward model's score below each answer: folder or hub id."
    )

    def named_paths(self) -> dict[str, str]:
        """Return the models by name; that of --path is named by the last part of its path."""
        if not self.models:
            return {Path(self.path).name or "model": self.path}
        return dict(_name_and_path(word) for word in self.models)

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        if not self.models:
            return required("--path", self.path)
        found = []
        if self.path:
            found.append("--path and --models: give one of them.")
        if len(self.models) > MAX_MODELS:
            found.append(f"--models has {len(self.models)} models; give at most {MAX_MODELS}.")
        names = [_name_and_path(word) for word in self.models]
        found += [
            f"--models {word}: give NAME=PATH."
            for word, pair in zip(self.models, names, strict=True)
            if not all(pair)
        ]
        if len(dict(names)) < len(names):
            found.append("--models: two models have the same name. Give each its own.")
        return found


@dataclass(frozen=True)
class AnswerOptions:
    """Sampling of answers, and the length of a conversation."""

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
        False,
        "Answer over HTTP (a page, POST /chat and OpenAI's /v1/chat/completions) instead of in "
        "the terminal.",
    )
    host: str = flag(
        "127.0.0.1", "Address to listen on. The default can be reached from this machine only."
    )
    public_url: Optional[str] = flag(
        None,
        "Address at which a proxy server shows the page, such as https://chat.example.org: its "
        "requests are accepted, and the proxy on this machine is trusted to name the sender.",
    )
    votes: Optional[str] = flag(
        None,
        "Folder to which votes are appended: preferences.jsonl holds pairs that step 2 reads. "
        "Default: no votes.",
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
        found: list[str] = []
        if self.model.models and not self.serving.serve:
            found.append("--models needs --serve. In the terminal, give one model with --path.")
        found += _public_url_problems(self.serving.public_url)
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
            texts = _changed(self.serving, names)
            texts += _changed(self.model, ("reward_model",))
            found += [f"{text} has no effect without --serve" for text in texts]
        return found


def _changed(options: Any, names: tuple[str, ...]) -> list[str]:
    """Return flag and value of each option in `names` that differs from its default."""
    defaults = {option.name: option.default for option in fields(options)}
    return [
        f"--{name} {getattr(options, name)}"
        for name in names
        if getattr(options, name) != defaults[name]
    ]


def _name_and_path(word: str) -> tuple[str, str]:
    """Split NAME=PATH; both are empty if there is no sign of equality."""
    name, sign, path = word.partition("=")
    return (name.strip(), path.strip()) if sign else ("", "")


def _public_url_problems(url: str | None) -> list[str]:
    """Check that `url` is an origin: http or https, a host, and no path."""
    if url is None:
        return []
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return [f"--public_url {url}: {error}. Give an address as https://chat.example.org."]
    is_origin = parts.scheme in ("http", "https") and parts.netloc and "@" not in parts.netloc
    if is_origin and parts.path in ("", "/") and not parts.query and not parts.fragment:
        return []
    return [f"--public_url {url}: give an address without a path, as https://chat.example.org."]
