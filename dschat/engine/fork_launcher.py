"""Run DeepSpeed's launcher for the ranks of this machine in a fork of the calling program.

`deepspeed main.py` imports DeepSpeed three times in a row: in the command, in the launcher that it
starts, and in main.py. A program that starts several steps pays for the first two only once, when
it imports this module.
"""

import base64
import json
import os
import signal
import sys
from typing import TextIO

from dschat.engine import deepspeed_launch


def start_launcher(
    words: list[str], *, num_processes: int, master_port: int, environment: dict[str, str]
) -> tuple[int, TextIO]:
    """Start a script in `num_processes` ranks on this machine.

    Args:
        words: the script and its arguments.
        num_processes: the number of ranks.
        master_port: a free port.
        environment: variables to set for the ranks.

    Returns:
        The launcher's process id, for which the caller must wait, and the output of the launcher
        and its ranks.
    """
    slots = json.dumps({"localhost": list(range(num_processes))})
    world = base64.urlsafe_b64encode(slots.encode()).decode()
    sys.stdout.flush()
    sys.stderr.flush()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Use only modules of this program from here on: threads and devices do not survive a fork.
        status = 1
        try:
            os.setsid()  # a terminal sends Ctrl-C to the caller alone, which forwards it
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # A handler here is the caller's, which forwards signals to this process.
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            os.dup2(writable, 1)
            os.dup2(writable, 2)
            os.environ.update(environment)
            options = [
                f"--world_info={world}",
                "--master_addr=127.0.0.1",
                f"--master_port={master_port}",
            ]
            sys.argv = [deepspeed_launch.__file__, *options, *words]
            deepspeed_launch.main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writable)
    return pid, os.fdopen(readable, errors="replace")
