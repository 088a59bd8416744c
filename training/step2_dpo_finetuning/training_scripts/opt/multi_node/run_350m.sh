#!/usr/bin/env bash
# DPO of OPT-350M on several nodes.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional OUTPUT=./output ZERO_STAGE=0 -- "$@"
launch dpo nodes \
    --model_name_or_path facebook/opt-350m \
    --data_path "${FOUR_SETS[@]}" --data_split 2,4,4 \
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --max_seq_len 512 \
    --learning_rate 5e-5 --weight_decay 0.1 --num_train_epochs 1 \
    --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 \
    --dropout 0.0 --zero_stage "$ZERO_STAGE" --deepspeed \
    --output_dir "$OUTPUT"
