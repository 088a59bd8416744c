"""Talk to a model, in the terminal or by HTTP."""

import logging
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from dschat.config.chat import ChatConfig
from dschat.config.parse import parse_config
from dschat.models.causal_lm import load_causal_lm
from dschat.models.inference_device import inference_placement
from dschat.models.tokenizer import load_tokenizer
from dschat.runtime.log import run_main
from dschat.runtime.run_record import recorded_format
from dschat.serving.chat_model import Answer, ChatModel
from dschat.serving.conversation import chat_format, fit_conversation, stop_text
from dschat.serving.requests import read_request
from dschat.serving.server import ChatServer, Limits, open_host_warning

PAGE = Path(__file__).with_name("page.html")
HELP = "clear: begin a new conversation; quit: end; Ctrl-C: stop an answer"


class Chat:
    """The model of a configuration with its prompt format and limits.

    Raises:
        ValueError: there is no such model, or it leaves no room for a conversation.
    """

    def __init__(self, config: ChatConfig):
        device, dtype = inference_placement(config.model.dtype)
        path = config.model.path
        trust = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(
            path,
            add_eot_token=config.model.add_eot_token,
            eot_token=config.model.eot_token,
            trust_remote_code=trust,
            flag="--path",
        )
        model = load_causal_lm(
            path, dtype=dtype, tokenizer=self.tokenizer, trust_remote_code=trust, flag="--path"
        )
        answers = config.answers
        self.model = ChatModel(
            model.to(device),
            self.tokenizer,
            temperature=answers.temperature,
            top_k=answers.top_k,
            top_p=answers.top_p,
            repetition_penalty=answers.repetition_penalty,
        )
        trained_on = recorded_format(path, answers.prompt_format)
        if trained_on == "plain" and answers.prompt_format == "auto":
            trained_on = "auto"  # texts to continue have no turns
        self.format = chat_format(trained_on, self.tokenizer)
        if self.format == "chat" and not self.tokenizer.chat_template:
            raise ValueError(
                f"--prompt_format chat: the tokenizer of --path {path} has no chat template. "
                "Give auto."
            )
        self.max_new_tokens = answers.max_new_tokens
        self.max_conversation_tokens = self.model.max_conversation_tokens(
            answers.max_prompt_seq_len, max_new_tokens=self.max_new_tokens
        )
        torch.manual_seed(answers.seed)

    def fit(self, messages: list[dict]) -> tuple[list[int], int]:
        """Encode a conversation; see ``fit_conversation``."""
        return fit_conversation(
            messages,
            self.tokenizer,
            prompt_format=self.format,
            max_tokens=self.max_conversation_tokens,
        )

    def answer(self, ids: list[int], *, max_new_tokens: int, **callbacks) -> Answer:
        """Generate an answer; see ``ChatModel.answer``."""
        return self.model.answer(
            ids, max_new_tokens=max_new_tokens, stop_text=stop_text(self.format), **callbacks
        )

    def as_turn(self, text: str) -> str:
        """Return an answer as the training steps read it in a conversation."""
        return text if self.format == "plain" else text.strip()


def printable(text: str) -> str:
    """Replace the characters of `text` that control a terminal."""
    return "".join(
        "\ufffd" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char
        for char in text
    )


def talk(chat: Chat, *, max_turns: int) -> None:
    """Hold a conversation in the terminal, until quit or the end of the input."""
    messages: list[dict] = []
    print(HELP)
    while True:
        try:
            text = input("\nyou: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command = text.strip().lower().removeprefix("/")
        if command == "quit":
            return
        if command == "clear":
            messages = []
            print("(a new conversation)")
        elif text.strip():
            messages = reply(chat, [*messages, {"role": "user", "content": text}])
            messages = messages[-2 * max_turns :]


def reply(chat: Chat, messages: list[dict]) -> list[dict]:
    """Print the answer to `messages` and return the conversation with it.

    If the last message cannot be answered, return the conversation without it.
    """
    try:
        ids, left_out = chat.fit(messages)
    except ValueError as error:
        print(f"({error})")
        return messages[:-1]
    if left_out:
        print(f"({left_out} older messages no longer fit and are left out)")
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        print(printable(piece), end="", flush=True)

    print("model: ", end="", flush=True)
    try:
        answer = chat.answer(ids, max_new_tokens=chat.max_new_tokens, show=show)
        print("" if answer.ended else " [cut at --max_new_tokens]")
    except KeyboardInterrupt:
        print(" [stopped]")
    return [*messages[left_out:], {"role": "assistant", "content": chat.as_turn("".join(pieces))}]


def make_server(chat: Chat, config: ChatConfig) -> ChatServer:
    """Return a server that listens but does not answer yet."""

    def read(body: bytes) -> tuple[list[int], int, int]:
        messages, max_new_tokens = read_request(
            body, max_turns=config.answers.max_turns, max_new_tokens=chat.max_new_tokens
        )
        ids, left_out = chat.fit(messages)
        return ids, left_out, max_new_tokens

    def answer(request: tuple[list[int], int, int], stop: Callable[[], bool]) -> dict:
        ids, left_out, max_new_tokens = request
        found = chat.answer(ids, max_new_tokens=max_new_tokens, stop=stop)
        return {**asdict(found), "text": chat.as_turn(found.text), "left_out": left_out}

    limits = Limits(
        max_request_bytes=config.serving.max_request_bytes,
        requests_per_minute=config.serving.requests_per_minute,
        max_wait_s=config.serving.max_wait_s,
    )
    return ChatServer(
        config.serving.host,
        config.serving.port,
        page=PAGE.read_text(encoding="utf-8"),
        read=read,
        answer=answer,
        limits=limits,
    )


def main() -> None:
    """Run the chat in the terminal, or serve it."""
    config = parse_config(ChatConfig)
    for line in config.without_effect():
        print(line)
    chat = Chat(config)
    if not config.serving.serve:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # else invalid UTF-8 would end the program
        talk(chat, max_turns=config.answers.max_turns)
        return
    server = make_server(chat, config)
    warning = open_host_warning(config.serving.host)
    if warning:
        logging.getLogger("dschat").warning(warning)
    host, port = server.server_address[:2]
    if ":" in host:  # IPv6
        host = f"[{host}]"
    print(f"http://{host}:{port}/ (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    finally:
        server.server_close()


if __name__ == "__main__":
    run_main(main)
