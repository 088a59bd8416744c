#!/usr/bin/env bash
# Scores of a reward model for good and bad answers, by one process.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/_launch.sh"

positional -- "$@"
evaluate step2_reward_model_finetuning/rw_eval.py --model_name_or_path ./output
