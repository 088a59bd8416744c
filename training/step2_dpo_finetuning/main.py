"""DPO: train the SFT model on preference pairs directly, without a reward model."""

from functools import partial

from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, DPOConfig))

from dschat.steps.dpo import run_dpo
from dschat.trainers.preflight import dry_run


def main() -> None:
    """Run DPO."""
    config = parse_config(DPOConfig)
    if config.run.dry_run:
        return dry_run(config)
    run_dpo(config)


if __name__ == "__main__":
    run_main(main)
