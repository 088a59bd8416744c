#!/usr/bin/env bash
# OPT-1.3B with LoRA on one GPU.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional OUTPUT=./output ZERO_STAGE=0 -- "$@"
launch 1 one \
    --model_name_or_path facebook/opt-1.3b \
    --gradient_accumulation_steps 8 --lora_dim 128 --lora_alpha 1 --zero_stage "$ZERO_STAGE" --deepspeed \
    --enable_tensorboard --tensorboard_path "$OUTPUT" --output_dir "$OUTPUT"
