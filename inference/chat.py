"""Talk to a model, in the terminal or by HTTP."""

from functools import partial

from dschat.config.chat import ChatConfig
from dschat.config.parse import parse_config
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the import below, which takes seconds.
    run_main(partial(parse_config, ChatConfig))

    from dschat.serving.program import main

    run_main(main)
