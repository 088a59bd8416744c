"""Logging set-up, and failures that end with their cause.

Libraries log through ``logging``; rank 0 shows INFO, the others only warnings. A main runs inside ``run_main``, so
that whatever stops it is the last thing on the screen.
"""

import errno
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings

from dschat.runtime import dist

logger = logging.getLogger("dschat")

# Seconds that ranks other than the first of a node hold back their message: time for that first rank, which most
# often fails of the same cause, to have reported it and for the launcher to have ended this one.
OTHER_RANKS_WAIT_S = 5.0

# Runs apart from the failed process and speaks once the launcher and its parent are gone (or after 30 s).
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
    """Plain messages on stdout: INFO on rank 0, warnings elsewhere; DeepSpeed and transformers only warn."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if dist.is_main() else logging.WARNING)
    for noisy in ("DeepSpeed", "transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # DeepSpeed still calls torch.distributed functions by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class Stopped(Exception):
    """The run was asked to stop, and has."""

    def __init__(self, message: str, *, status: int):
        super().__init__(message)
        self.status = status


def run_main(main) -> None:
    """Run ``main()`` and exit 0; at a failure exit 1 with its cause as the last thing printed.

    A ValueError is the user's to mend and shows as its message alone; anything else brings its traceback first.
    Under the ``deepspeed`` launcher the message appears once more behind the launcher's own lines.
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
        traceback.print_exc()
        words = str(error)
        # What the collectives of torch say when the other side is gone.
        lost = any(
            word in words
            for word in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
        )
        if lost:
            # At once, since the launcher may end this process while it gives the other one time to speak.
            words = f"another process of the run has ended: look for its error above ({words.splitlines()[0]})"
            sys.stderr.write(f"\nrank {dist.rank()}: {words}\n")
            sys.stderr.flush()
        _fail(f"{type(error).__name__}: {words}{advice(error)}")
    sys.stdout.flush()


def advice(error: Exception) -> str:
    """What to change where a library fails for a reason that the user can mend; "" for other errors."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "\nThe GPU's memory ran out: lower --per_device_train_batch_size (step 3: --per_device_training_batch_size "
            "and --per_device_generation_batch_size), add --gradient_checkpointing (step 3: "
            "--actor_gradient_checkpointing), --offload or LoRA, or raise the ZeRO stage; python -m dschat.plan says "
            "what fits."
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return (
            "\nThe host's memory ran out: leave --offload out, or run fewer processes on each node."
        )
    # safetensors has an error of its own, with no number.
    if (
        isinstance(error, OSError) and error.errno == errno.ENOSPC
    ) or "No space left on device" in text:
        return "\nThe disk is full: free some of it, or give another --output_dir."
    if "NCCL" in text or type(error).__name__ in (
        "DistNetworkError",
        "DistStoreError",
        "DistBackendError",
    ):
        return (
            "\nThe processes could not talk to each other: see that no other run uses the master port, that all nodes "
            "reach the first one, and what NCCL_DEBUG=INFO prints; python -m dschat.doctor looks at this machine."
        )
    return ""


def _fail(cause: str, *, status: int = 1, word: str = "error") -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        time.sleep(OTHER_RANKS_WAIT_S)
    message = f"\n{word} (rank {dist.rank()}): {cause}\n"
    sys.stdout.flush()
    sys.stderr.write(message)
    sys.stderr.flush()
    launcher = _launcher_pids()
    if launcher:
        words = [sys.executable, "-c", _LAST_WORD, message, ",".join(map(str, launcher))]
        subprocess.Popen(words, start_new_session=True, stdin=subprocess.DEVNULL)
    # Not sys.exit: a process group whose peers are gone can hang in its destructors.
    os._exit(status)


def _launcher_pids() -> list[int]:
    """The process ids of DeepSpeed's launcher and of the command above it, where this process runs under one."""
    try:
        import psutil
    except ImportError:  # comes with DeepSpeed; without it there is no launcher either
        return []
    try:
        parent = psutil.Process().parent()
        if parent is None or not any("deepspeed" in word for word in parent.cmdline()):
            return []
        above = parent.parent()
        is_command = above is not None and any("deepspeed" in word for word in above.cmdline())
    except psutil.Error:  # the launcher is going away already
        return []
    return [parent.pid] + ([above.pid] if is_command else [])
