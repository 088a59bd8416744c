"""Step 1: supervised fine-tuning of a causal language model on demonstrations."""

from functools import partial

from dschat.config.parse import parse_config
from dschat.config.sft import SFTConfig
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, SFTConfig))

from dschat.steps.sft import run_sft
from dschat.trainers.preflight import dry_run


def main() -> None:
    """Run step 1."""
    config = parse_config(SFTConfig)
    if config.run.dry_run:
        return dry_run(config)
    run_sft(config)


if __name__ == "__main__":
    run_main(main)
