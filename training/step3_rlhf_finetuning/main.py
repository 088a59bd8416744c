"""Step 3: train the SFT model with PPO against the reward."""

from functools import partial

from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.runtime.log import run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, PPOConfig))

from dschat.steps.ppo import run_ppo
from dschat.trainers.preflight import dry_run


def main() -> None:
    """Run step 3."""
    config = parse_config(PPOConfig)
    if config.run.dry_run:
        return dry_run(config)
    run_ppo(config)


if __name__ == "__main__":
    run_main(main)
