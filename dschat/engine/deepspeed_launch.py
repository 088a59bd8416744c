"""DeepSpeed's launcher of the ranks of one host, which waits for their checkpoints.

DeepSpeed's own kills the ranks 30 s after a signal. A rank stops after the update that it is in,
and that may take longer.
"""

import base64
import json
import os
import tempfile
import time
from pathlib import Path

import psutil
from deepspeed.launcher import launch

from dschat.runtime import grace

# A terminal and a runner may both send the signal of one Ctrl-C.
REPEATED_WITHIN_S = 1.0


class RankEnd:
    """Ends one rank after the other, in place of ``launch.terminate_process_tree``.

    After a signal to the launcher, ranks get the time of ``grace.grace_s``; after the failure of a
    rank, 30 s. A second signal kills them.
    """

    def __init__(self, file: Path, *, num_ranks: int):
        """Start before any signal.

        Args:
            file: ranks write their longest update to it.
            num_ranks: ranks of this host.
        """
        self._file = file
        self._num_ranks = num_ranks
        self._deadline = 0.0
        self._began = 0.0
        self._waits = False
        self._kills = False

    def __call__(self, pid: int) -> None:
        """End the process `pid` and all below it."""
        now = time.monotonic()
        if not self._began:
            self._began = now
            self._deadline = now + self._grace_s()
        # A call within a call: a signal interrupted the wait below.
        self._kills |= self._waits and now - self._began > REPEATED_WITHIN_S
        process = psutil.Process(pid)
        processes = [*process.children(recursive=True), process]
        for each in processes:
            _end(each, kill=self._kills)
        before = self._waits
        self._waits = True
        left_s = 0.0 if self._kills else max(0.0, self._deadline - now)
        _, alive = psutil.wait_procs(processes, timeout=left_s)
        self._waits = before
        for each in alive:
            _end(each, kill=True)

    def _grace_s(self) -> float:
        ranks = [
            child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE
        ]
        has_failed = len(ranks) < self._num_ranks
        return grace.SHORTEST_S if has_failed else grace.grace_s(self._file)


def _end(process: psutil.Process, *, kill: bool) -> None:
    try:
        if kill:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        pass


def main() -> None:
    """Start the ranks that the command line describes, as ``deepspeed.launcher.launch`` does."""
    with tempfile.TemporaryDirectory(prefix="dschat_grace_") as folder:
        file = Path(folder) / "longest_update_s"
        os.environ[grace.VARIABLE] = str(file)
        launch.terminate_process_tree = RankEnd(file, num_ranks=_num_ranks())
        launch.main()


def _num_ranks() -> int:
    """Return the number of ranks of this host, from the command line."""
    args = launch.parse_args()
    ranks_by_host = json.loads(base64.urlsafe_b64decode(args.world_info))
    return len(list(ranks_by_host.values())[args.node_rank])


if __name__ == "__main__":
    main()
