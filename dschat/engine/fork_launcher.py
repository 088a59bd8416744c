"""DeepSpeed's launcher for the processes of this machine, run in a fork of the calling program.

`deepspeed main.py` imports DeepSpeed three times, one after the other: the command, the launcher that it starts, and
main.py. A program that starts several steps pays for the first two once, when it imports this module.
"""

import base64
import json
import os
import signal
import sys
from typing import TextIO

from deepspeed.launcher import launch


def start_launcher(
    words: list[str], *, num_processes: int, master_port: int, environment: dict[str, str]
) -> tuple[int, TextIO]:
    """Start `words`, a script and its arguments, in `num_processes` processes on this machine.

    Args:
        environment: variables to set for them.

    Returns:
        The launcher's process id, to be waited for, and the output of it and of its processes.
    """
    world = base64.urlsafe_b64encode(
        json.dumps({"localhost": list(range(num_processes))}).encode()
    ).decode()
    sys.stdout.flush()
    sys.stderr.flush()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Nothing that this program holds is used in here but modules: threads and devices do not survive a fork.
        status = 1
        try:
            os.setsid()  # a terminal's Ctrl-C goes to the caller, which hands it on
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if callable(
                    signal.getsignal(number)
                ):  # the caller's, who would hand it on to itself
                    signal.signal(number, signal.SIG_DFL)
            os.dup2(writable, 1)
            os.dup2(writable, 2)
            os.environ.update(environment)
            options = [
                f"--world_info={world}",
                "--master_addr=127.0.0.1",
                f"--master_port={master_port}",
            ]
            sys.argv = [launch.__file__, *options, *words]
            launch.main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writable)
    return pid, os.fdopen(readable, errors="replace")
