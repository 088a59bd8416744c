"""The chat program: in the terminal, or served."""

import importlib.util
import logging
import sys

from dschat.config.chat import ChatConfig
from dschat.config.parse import parse_config
from dschat.serving.answering import Settings
from dschat.serving.chat import Chat, Scorer, load_chats
from dschat.serving.terminal import Terminal

SERVER_PACKAGES = ("fastapi", "uvicorn")


def main() -> None:
    """Run the chat in the terminal, or serve it."""
    config = parse_config(ChatConfig)
    for line in config.without_effect():
        print(line)
    if config.serving.serve:
        serve(config)
        return
    chat = Chat(config)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # else invalid UTF-8 would end the program
    Terminal(chat, max_turns=config.answers.max_turns).talk()


def make_server(config: ChatConfig):
    """Return a ``ChatServer`` that listens but does not answer yet.

    Raises:
        ValueError: a package is missing, a model cannot be used, or the address is taken.
    """
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'--serve needs {" and ".join(missing)}, which the extra "chat" installs: '
            "pip install 'dschat[chat]' (in a copy of the repository: pip install -e '.[chat]')."
        )
    from dschat.serving.app import Address, make_app
    from dschat.serving.guard import Limits
    from dschat.serving.requests import Bounds
    from dschat.serving.server import ChatServer
    from dschat.serving.votes import VoteFiles

    serving = config.serving
    votes = VoteFiles(serving.votes) if serving.votes else None
    chats = load_chats(config)
    first = next(iter(chats.values()))
    scorer = Scorer(config) if config.model.reward_model else None
    app = make_app(
        chats,
        Bounds(
            models=tuple(chats),
            max_turns=config.answers.max_turns,
            settings=Settings(first.max_new_tokens, first.sampling),
        ),
        address=Address(serving.host, serving.public_url),
        limits=Limits(
            max_request_bytes=serving.max_request_bytes,
            requests_per_minute=serving.requests_per_minute,
            max_wait_s=serving.max_wait_s,
        ),
        score=scorer.score if scorer else None,
        votes=votes,
    )
    return ChatServer(app, serving.host, serving.port, behind_proxy=bool(serving.public_url))


def serve(config: ChatConfig) -> None:
    """Serve the chat until Ctrl-C."""
    server = make_server(config)
    from dschat.serving.server import open_host_warning

    warning = open_host_warning(config.serving.host)
    if warning:
        logging.getLogger("dschat").warning(warning)
    host, port = server.address
    if ":" in host:  # IPv6
        host = f"[{host}]"
    print(f"http://{host}:{port}/ (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
