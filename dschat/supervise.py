"""Start a training command, and start it again after a fault (--max_restarts of the main).

python -m dschat.supervise torchrun --nproc_per_node 8 MAIN.py --max_restarts 5 [flags of MAIN.py]
"""

import sys

from dschat.runtime.supervisor import restart_options, supervise


def main() -> int:
    """Supervise the command in the arguments; return its exit status."""
    command = sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if command else 2
    options = restart_options(command)
    if options is None:
        sys.exit(
            "dschat.supervise: the command needs a main.py, and after it --max_restarts N (at "
            "least 1) and --output_dir."
        )
    try:
        return supervise(command, options)
    except OSError as error:
        sys.exit(f"dschat.supervise: {command[0]} cannot be started ({error.strerror})")


if __name__ == "__main__":
    sys.exit(main())
