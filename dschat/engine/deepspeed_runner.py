"""DeepSpeed's command, with ranks that have time to save: see ``deepspeed_launch``.

python -m dschat.engine.deepspeed_runner [flags of deepspeed] main.py [flags of main.py]
"""

import subprocess
from typing import Any

from deepspeed.launcher import runner

LAUNCH = "deepspeed.launcher.launch"
OUR_LAUNCH = "dschat.engine.deepspeed_launch"


def main() -> None:
    """Run ``deepspeed``, which starts OUR_LAUNCH on each host in place of LAUNCH."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen:
        return popen([OUR_LAUNCH if word == LAUNCH else word for word in command], **options)

    runner.subprocess.Popen = start
    runner.main()


if __name__ == "__main__":
    main()
