"""DeepSpeed's command, with ranks that have time to save (``deepspeed_launch``) and --max_restarts.

python -m dschat.engine.deepspeed_runner [flags of deepspeed] main.py [flags of main.py]
"""

import os
import sys
from typing import Any

from dschat.runtime.supervisor import VARIABLE, restart_options, supervise

MODULE = "dschat.engine.deepspeed_runner"
LAUNCH = "deepspeed.launcher.launch"
OUR_LAUNCH = "dschat.engine.deepspeed_launch"


def main() -> None:
    """Run ``deepspeed``, or supervise it if the main has --max_restarts."""
    options = restart_options(sys.argv[1:])
    if options is not None and VARIABLE not in os.environ:
        sys.exit(supervise([sys.executable, "-m", MODULE, *sys.argv[1:]], options))
    run_deepspeed()


def run_deepspeed() -> None:
    """Run ``deepspeed``, which starts OUR_LAUNCH on each host in place of LAUNCH."""
    # Here, since a supervisor does not need DeepSpeed.
    from deepspeed.launcher import runner

    popen = runner.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([OUR_LAUNCH if word == LAUNCH else word for word in command], **options)

    runner.subprocess.Popen = start
    runner.EXPORT_ENVS.append(VARIABLE)  # to the ranks of other hosts
    runner.main()


if __name__ == "__main__":
    main()
