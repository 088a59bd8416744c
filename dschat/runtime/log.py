"""Logging, and exits that print the cause of a failure last.

The package logs through ``logging``; rank 0 shows INFO, other ranks only warnings. Every main runs
in ``run_main``, which makes the cause of a failure the last thing on the screen.
"""

import errno
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from dschat.runtime.live_line import TerminalHandler, has_terminal

logger = logging.getLogger("dschat")
# A filter, since DeepSpeed sets its logger's level when it is imported. It warns of what needs no
# action, such as a machine without an accelerator.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

# Seconds that ranks other than the first of a node delay their message. The first rank usually
# fails of the same cause and reports it, and the launcher then ends the other ranks.
OTHER_RANKS_WAIT_S = 5.0

# Runs in a process that outlives the failed one, and prints when the launcher and its parent are
# gone (or after 30 s).
_LAST_WORD = """
import sys, time, psutil
def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
pids = [int(word) for word in sys.argv[2].split(",")]
end = time.time() + 30
while time.time() < end and any(alive(pid) for pid in pids):
    time.sleep(0.05)
sys.stderr.write(sys.argv[1])
"""


def set_up_logging() -> None:
    """Log plain messages to stdout: INFO on rank 0, warnings on others, errors of libraries."""
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if has_terminal():
        handler = TerminalHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if _rank() == 0 else logging.WARNING)
    for noisy in ("transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # DeepSpeed still calls torch.distributed functions by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class Stopped(Exception):
    """Raised after a run has stopped because it was asked to; `status` is its exit status."""

    def __init__(self, message: str, *, status: int):
        super().__init__(message)
        self.status = status


def run_main(main: Callable[[], object]) -> None:
    """Run ``main()`` and exit 0; on a failure exit 1 and print the cause last.

    A ValueError is for the user to fix: only its message is shown. Other exceptions are shown with
    their traceback, unless they only say that another rank has ended. Under the ``deepspeed``
    launcher the message is printed again after the launcher's own lines.
    """
    set_up_logging()
    try:
        main()
    except ValueError as error:
        if os.environ.get("DSCHAT_DEBUG"):
            traceback.print_exc()
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted")
    except Stopped as stop:
        _fail(str(stop), status=stop.status, word="stopped")
    except Exception as error:
        words = str(error)
        # Messages of torch's collectives when another rank is gone.
        lost = any(
            word in words
            for word in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
        )
        if not lost or os.environ.get("DSCHAT_DEBUG"):
            traceback.print_exc()
        if lost:
            # Print now: the launcher may end this rank while _fail waits for the other rank.
            first_line = words.splitlines()[0]
            words = f"another rank of the run has ended: see its error above ({first_line})"
            sys.stderr.write(f"\nrank {_rank()}: {words}\n")
            sys.stderr.flush()
        _fail(f"{type(error).__name__}: {words}{advice(error)}")
    for handler in logger.handlers:
        handler.close()  # removes a live line
    sys.stdout.flush()


def advice(error: Exception) -> str:
    """Return what the user can change after a library's error; "" for unknown errors."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "\nThe GPU is out of memory. Lower --per_device_train_batch_size (step 3: "
            "--per_device_training_batch_size and --per_device_generation_batch_size), add "
            "--gradient_checkpointing (step 3: --actor_gradient_checkpointing), --offload or LoRA, "
            "or raise the ZeRO stage. python -m dschat.plan shows what fits."
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return (
            "\nThe host is out of memory. Leave --offload out, lower the batch sizes and lengths "
            "(--per_device_train_batch_size, --max_seq_len; step 3: "
            "--per_device_generation_batch_size, --per_device_training_batch_size, "
            "--max_answer_seq_len), or run fewer ranks on each node."
        )
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    # safetensors raises another type, without errno.
    if is_full or "No space left on device" in text:
        return "\nThe disk is full: free some of it, or give another --output_dir."
    network_errors = ("DistNetworkError", "DistStoreError", "DistBackendError")
    if "NCCL" in text or type(error).__name__ in network_errors:
        return (
            "\nThe ranks could not communicate. Check that no other run uses the master port, that "
            "all nodes reach the first one, and what NCCL_DEBUG=INFO prints. "
            "python -m dschat.doctor checks this machine."
        )
    return ""


def _fail(cause: str, *, status: int = 1, word: str = "error") -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        time.sleep(OTHER_RANKS_WAIT_S)
    message = f"\n{word} (rank {_rank()}): {cause}\n"
    for handler in logger.handlers:
        handler.close()  # removes a live line
    sys.stdout.flush()
    sys.stderr.write(message)
    sys.stderr.flush()
    launcher = _launcher_pids()
    if launcher:
        words = [sys.executable, "-c", _LAST_WORD, message, ",".join(map(str, launcher))]
        subprocess.Popen(words, start_new_session=True, stdin=subprocess.DEVNULL)
    # Not sys.exit: a process group whose peers are gone can hang in its destructors.
    os._exit(status)


def _rank() -> int:
    """Return this process's rank, without torch: flags are checked before it is imported.

    A launcher sets it, or ``start_processes``.
    """
    return int(os.environ.get("RANK", 0))


def _launcher_pids() -> list[int]:
    """Return the process ids of DeepSpeed's launcher and of the command above it, if any."""
    try:
        import psutil
    except ImportError:  # DeepSpeed needs it; without it there is no launcher either
        return []
    try:
        parent = psutil.Process().parent()
        if parent is None or not any("deepspeed" in word for word in parent.cmdline()):
            return []
        above = parent.parent()
        is_command = above is not None and any("deepspeed" in word for word in above.cmdline())
    except psutil.Error:  # the launcher is ending already
        return []
    pids = [parent.pid]
    if above is not None and is_command:
        pids.append(above.pid)
    return pids
