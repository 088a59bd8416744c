#!/usr/bin/env bash
# OPT-1.3B on all GPUs of this machine.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional OUTPUT=./output ZERO_STAGE=2 -- "$@"
launch 1 all \
    --model_name_or_path facebook/opt-1.3b \
    --data_path "${FOUR_SETS[@]}" --data_split 2,4,4 \
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_seq_len 512 \
    --learning_rate 9.65e-6 --weight_decay 0 --num_train_epochs 16 \
    --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 \
    --zero_stage "$ZERO_STAGE" --deepspeed \
    --enable_tensorboard --tensorboard_path "$OUTPUT" --output_dir "$OUTPUT"
