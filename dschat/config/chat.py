"""The configuration of the chat program."""

from dataclasses import dataclass, fields

from dschat.config.eval_tools import InferenceModel
from dschat.config.options import PromptFormat, flag
from dschat.config.value_checks import above, at_least, in_range, required, seed_value, share


@dataclass(frozen=True)
class ChatModel(InferenceModel):
    path: str = flag(
        "",
        "The model to talk to: a folder that step 1 or 3 wrote (OUTPUT/actor), or a hub id. Required.",
    )


@dataclass(frozen=True)
class Answers:
    _argument_group_name = "answers"

    max_new_tokens: int = flag(
        128, "Most tokens of an answer. With --serve a request may ask for fewer, never for more."
    )
    temperature: float = flag(
        0.0, "Above 0: draw tokens at this temperature. 0: always the likeliest token."
    )
    top_k: int = flag(0, "Draw from this many likeliest tokens; 0: from all.")
    top_p: float = flag(
        1.0, "Draw from the likeliest tokens that together have this probability; 1: from all."
    )
    repetition_penalty: float = flag(
        1.0, "Above 1: tokens that were there already become less likely."
    )
    seed: int = flag(1234, "Seed of the draws.")
    prompt_format: PromptFormat = flag(
        "auto",
        "How the conversation becomes text: chat (the tokenizer's chat template), human_assistant, plain (the texts as "
        "they stand, which the model continues), or auto (the chat template where there is one, else human_assistant).",
    )
    max_prompt_seq_len: int = flag(
        1024,
        "Longest conversation in tokens, and never more than the model has positions for; the oldest turns go first.",
    )
    max_turns: int = flag(
        32,
        "Turns of a conversation: the terminal forgets older ones, a request with more is refused.",
    )


@dataclass(frozen=True)
class Serving:
    _argument_group_name = "serving"

    serve: bool = flag(False, "Answer by HTTP (a page and POST /chat) instead of in the terminal.")
    host: str = flag(
        "127.0.0.1", "Address to listen on. The default is reached from this machine alone."
    )
    port: int = flag(8000, "Port to listen on; 0: any that is free.")
    max_request_bytes: int = flag(65536, "Larger requests are refused (413).")
    requests_per_minute: int = flag(
        30, "More requests of one address within a minute are refused (429)."
    )
    max_wait_s: float = flag(
        30.0, "A request that waits longer than this for its turn is refused (503)."
    )


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model."""

    model: ChatModel
    answers: Answers
    serving: Serving

    def problems(self) -> list[str]:
        """Everything that is wrong with these options, one sentence each."""
        found = required("--path", self.model.path)
        for name in ("max_new_tokens", "max_prompt_seq_len", "max_turns"):
            found += at_least("--" + name, getattr(self.answers, name), 1)
        for name in ("temperature", "top_k"):
            found += at_least("--" + name, getattr(self.answers, name), 0)
        found += share("--top_p", self.answers.top_p, 1.0) + seed_value("--seed", self.answers.seed)
        found += above("--repetition_penalty", self.answers.repetition_penalty, 0.0)
        found += in_range("--port", self.serving.port, 0, 65535)
        for name in ("max_request_bytes", "requests_per_minute"):
            found += at_least("--" + name, getattr(self.serving, name), 1)
        return found + at_least("--max_wait_s", self.serving.max_wait_s, 0)

    def without_effect(self) -> list[str]:
        """The flags that were given and change nothing, one sentence each."""
        found = []
        if self.answers.temperature == 0:
            found += [
                f"{name} has no effect at --temperature 0"
                for name in _changed(self.answers, ("top_k", "top_p"))
            ]
        if not self.serving.serve:
            names = tuple(option.name for option in fields(Serving))
            found += [
                f"{name} has no effect without --serve" for name in _changed(self.serving, names)
            ]
        return found


def _changed(options, names: tuple[str, ...]) -> list[str]:
    """The flags among `names` whose values are not the defaults."""
    defaults = {option.name: option.default for option in fields(options)}
    return [
        f"--{name} {getattr(options, name)}"
        for name in names
        if getattr(options, name) != defaults[name]
    ]
