#!/usr/bin/env bash
# Answers of a model before and after training, by one process.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../scripts/_launch.sh"

positional -- "$@"
evaluate step1_supervised_finetuning/prompt_eval.py \
    --model_name_or_path_baseline facebook/opt-1.3b --model_name_or_path_finetune ./output
