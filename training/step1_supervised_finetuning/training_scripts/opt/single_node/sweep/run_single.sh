#!/usr/bin/env bash
# One run of the sweep: OPT-1.3B on all GPUs of this machine, OFFLOAD and LORA true or false.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../../scripts/_launch.sh"

positional ZERO_STAGE=2 OFFLOAD=false LORA=false OUTPUT=./output -- "$@"
switch OFFLOAD --offload
switch LORA --lora_dim 128 --lora_alpha 1 --only_optimize_lora --learning_rate 1e-3 --weight_decay 0.1
launch 1 all \
    --model_name_or_path facebook/opt-1.3b --data_path "${FOUR_SETS[@]}" --data_split 2,4,4 \
    --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 \
    --learning_rate 9.65e-6 --weight_decay 0 --num_train_epochs 16 \
    --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 \
    --zero_stage "$ZERO_STAGE" --deepspeed --output_dir "$OUTPUT" "${SWITCHED[@]}"
