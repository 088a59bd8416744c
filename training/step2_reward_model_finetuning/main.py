"""Step 2: train a reward model on preference pairs."""

from functools import partial

from dschat.config.parse import parse_config
from dschat.config.reward import RewardConfig
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, RewardConfig))

from dschat.steps.reward import run_reward
from dschat.trainers.preflight import dry_run


def main() -> None:
    """Run step 2."""
    config = parse_config(RewardConfig)
    if config.run.dry_run:
        return dry_run(config)
    run_reward(config)


if __name__ == "__main__":
    run_main(main)
