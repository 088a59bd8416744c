"""A process that calls a reward function: ``python -m dschat.rewards.worker NAME SOCKET``.

It reads a request, answers it, and ends if the other side of the socket closes or its parent ends.
"""

import os
import pickle
import sys
import threading
import time
from multiprocessing.connection import Connection

from dschat.rewards.loading import Caller, load_function
from dschat.rewards.references import MissingColumn

PARENT_CHECK_S = 1.0


def main() -> None:
    """Serve requests until the socket closes."""
    name, descriptor = sys.argv[1:]
    connection = Connection(int(descriptor))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    call = Caller(load_function(name))
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        connection.send_bytes(_reply(call, *request))


def _reply(call: Caller, prompts: list[str], answers: list[str], columns: dict) -> bytes:
    """Return ("scores", list), or ("missing" or "error", message), as the pool reads it."""
    try:
        scores = call(prompts, answers, columns)
    except MissingColumn as error:
        return pickle.dumps(("missing", str(error)))
    except (Exception, SystemExit) as error:
        return pickle.dumps(("error", f"{type(error).__name__}: {error}"))
    try:
        return pickle.dumps(("scores", scores))
    except Exception:  # objects that are no scores: the message about them needs their text
        shown = [repr(score) for score in scores] if isinstance(scores, list) else repr(scores)
        return pickle.dumps(("scores", shown))


def _end_with_parent(parent: int) -> None:
    """End this process, even if the function hangs, after the one that started it."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


if __name__ == "__main__":
    main()
