"""A conversation in the terminal."""

import contextlib
import unicodedata
from dataclasses import replace

from dschat.serving.chat_model import Sampling

HELP = (
    "/clear: a new conversation; /retry: another answer; /system TEXT: the system prompt; "
    "/sampling NAME VALUE;\n/help; /quit. Ctrl-C stops an answer. Arrows recall earlier lines."
)
TYPES = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
# Words that are commands also without the slash.
BARE_COMMANDS = ("clear", "quit")


class Terminal:
    """A conversation with one model in the terminal.

    Args:
        chat: the model.
        max_turns: turns that are remembered.
    """

    def __init__(self, chat, *, max_turns: int):
        self.chat = chat
        self.max_turns = max_turns
        self.sampling: Sampling = chat.sampling
        self.system = ""
        self.turns: list[dict] = []  # messages without the system prompt

    def talk(self) -> None:
        """Read lines and answer them, until /quit or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() arrows and a history
        print(HELP)
        while True:
            try:
                text = input("\nyou: ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            word, _, rest = text.strip().partition(" ")
            command = word.lower()
            if not rest and command in BARE_COMMANDS:
                command = f"/{command}"
            if command == "/quit":
                return
            if command.startswith("/"):
                self.obey(command, rest.strip())
            elif text.strip():
                self.reply(text)

    def obey(self, command: str, rest: str) -> None:
        """Run a command; `rest` is what follows it on the line."""
        if command == "/clear":
            self.turns = []
            print("(a new conversation)")
        elif command == "/retry":
            self.retry()
        elif command == "/system":
            self.system = rest
            self.turns = []
            print("(a new conversation, " + ("with" if rest else "without") + " a system prompt)")
        elif command == "/sampling":
            self.set_sampling(rest)
        elif command == "/help":
            print(HELP)
        else:
            print(f"(no command {printable(command)}; /help lists them)")

    def retry(self) -> None:
        """Answer the last message again."""
        if not self.turns:
            print("(nothing to answer again)")
            return
        text = self.turns[-2]["content"]
        kept = self.turns
        self.turns = kept[:-2]
        if not self.reply(text):
            self.turns = kept

    def set_sampling(self, rest: str) -> None:
        """Change one setting of sampling by "NAME VALUE", and print all."""
        name, _, value = rest.partition(" ")
        if rest:
            try:
                changed = replace(self.sampling, **{name: TYPES[name](value)})
                check_sampling(changed)
            except (KeyError, ValueError) as error:
                reason = str(error) if isinstance(error, ValueError) else f"no setting {name}"
                print(f"({printable(reason)}; give one of {', '.join(TYPES)} and a number)")
                return
            self.sampling = changed
        shown = [f"{name} {getattr(self.sampling, name):g}" for name in TYPES]
        print(f"({', '.join(shown)})")

    def reply(self, text: str) -> bool:
        """Print the answer to a message and keep both; return whether there is an answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        self.turns.append({"role": "user", "content": text})
        try:
            ids, left_out = self.chat.fit([*system, *self.turns])
        except ValueError as error:
            print(f"({error})")
            self.turns.pop()
            return False
        if left_out:
            print(f"({left_out} older messages no longer fit and are left out)")
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(printable(piece), end="", flush=True)

        print("model: ", end="", flush=True)
        try:
            answer = self.chat.answer(
                ids,
                max_new_tokens=self.chat.max_new_tokens,
                sampling=self.sampling,
                show=show,
            )
            print("" if answer.ended else " [cut at --max_new_tokens]")
        except KeyboardInterrupt:
            print(" [stopped]")
        content = self.chat.as_turn("".join(pieces))
        self.turns = [*self.turns[left_out:], {"role": "assistant", "content": content}]
        self.turns = self.turns[-2 * self.max_turns :]
        return True


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError if a setting is out of its range."""
    if not 0 <= sampling.temperature <= 10:
        raise ValueError("temperature is from 0 to 10")
    if sampling.top_k < 0:
        raise ValueError("top_k is at least 0")
    if not 0 < sampling.top_p <= 1:
        raise ValueError("top_p is above 0 and at most 1")
    if not 0.01 <= sampling.repetition_penalty <= 100:
        raise ValueError("repetition_penalty is from 0.01 to 100")


def printable(text: str) -> str:
    """Replace the characters of `text` that control a terminal."""
    return "".join(
        "\ufffd" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char
        for char in text
    )
