#!/usr/bin/env bash
# DPO of OPT-350M on one GPU.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional OUTPUT=./output ZERO_STAGE=0 -- "$@"
launch dpo one \
    --model_name_or_path facebook/opt-350m \
    --weight_decay 0.1 --dropout 0.0 \
    --gradient_accumulation_steps 4 --zero_stage "$ZERO_STAGE" --deepspeed \
    --enable_tensorboard --tensorboard_path "$OUTPUT" --output_dir "$OUTPUT"
