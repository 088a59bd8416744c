"""The time between a signal and the end of a run that a launcher must allow.

A run stops after the update or rollout that a signal finds it in, so the time depends on the
longest one so far. Ranks write its length to a file that the launcher names.
"""

import os
from pathlib import Path

VARIABLE = "DSCHAT_GRACE_FILE"  # names the file; only dschat's launchers set it
# Seconds that every rank gets: those of DeepSpeed's and torch's launchers.
SHORTEST_S = 30.0
# Seconds before the first update has ended, since its length is not known.
FIRST_S = 600.0

_longest_s = 0.0


def report_update(seconds: float) -> None:
    """Tell the launcher the length of an update or rollout, if it is the longest so far."""
    global _longest_s
    if seconds <= _longest_s:
        return
    _longest_s = seconds
    file = os.environ.get(VARIABLE)
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        temporary = Path(f"{file}.{os.getpid()}")
        try:
            temporary.write_text(f"{seconds:.3f}")
            os.replace(temporary, file)
        except OSError:  # the launcher is ending, and has deleted the folder
            return


def grace_s(file: Path) -> float:
    """Return the seconds that ranks need after a signal: for an update, and to save.

    Args:
        file: the file that VARIABLE names in the ranks.
    """
    try:
        longest_s = float(file.read_text())
    except (OSError, ValueError):
        return FIRST_S
    return SHORTEST_S + 2 * longest_s


def launcher_hint() -> str:
    """Return a warning if the launcher may end the run before its update is over, else ""."""
    # DeepSpeed's launcher sets LOCAL_SIZE.
    by_deepspeed = "LOCAL_SIZE" in os.environ and VARIABLE not in os.environ
    if not by_deepspeed or _longest_s < SHORTEST_S / 2:
        return ""
    return (
        f"; DeepSpeed's launcher ends it after {SHORTEST_S:.0f} s, and updates take up to "
        f"{_longest_s:.0f} s: start with python -m dschat.engine.deepspeed_runner instead of "
        "deepspeed, which waits"
    )
