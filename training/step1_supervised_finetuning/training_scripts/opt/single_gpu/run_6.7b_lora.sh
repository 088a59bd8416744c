#!/usr/bin/env bash
# OPT-6.7B with LoRA on one GPU. LoRA usually needs a larger learning rate.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional -- "$@"
launch 1 one \
    --model_name_or_path facebook/opt-6.7b \
    --data_path "${FOUR_SETS[@]}" --data_split 2,4,4 \
    --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 \
    --learning_rate 1e-3 --weight_decay 0 --num_train_epochs 16 \
    --gradient_accumulation_steps 16 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 \
    --gradient_checkpointing --lora_dim 128 --lora_alpha 1 \
    --zero_stage 0 --deepspeed \
    --output_dir ./output
