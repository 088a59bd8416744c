#!/usr/bin/env bash
# DPO of Llama-2-7B with LoRA on all GPUs of this machine.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../scripts/_launch.sh"

positional OUTPUT=./output_step2_llama_7b_epoch1_lr9.65e-6 ZERO_STAGE=3 -- "$@"
launch dpo all \
    --model_name_or_path meta-llama/Llama-2-7b-hf \
    --data_path Dahoas/rm-static --data_split 2,4,4 \
    --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 \
    --learning_rate 9.65e-6 --weight_decay 0.1 --num_train_epochs 1 \
    --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 \
    --gradient_checkpointing --offload --lora_dim 128 --lora_alpha 1 \
    --zero_stage "$ZERO_STAGE" --deepspeed \
    --output_dir "$OUTPUT"
