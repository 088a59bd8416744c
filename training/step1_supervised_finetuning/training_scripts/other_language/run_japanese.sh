#!/usr/bin/env bash
# mGPT on Japanese data, which has no rejected answers: all of it for step 1.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../scripts/_launch.sh"

positional OUTPUT=./output ZERO_STAGE=2 -- "$@"
launch 1 all \
    --model_name_or_path ai-forever/mGPT \
    --data_path mkqa-Japanese Cohere/miracl-ja-queries-22-12 lmqg/qg_jaquad lmqg/qag_jaquad \
    --data_split 10,0,0 \
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --max_seq_len 512 \
    --learning_rate 9.65e-6 --weight_decay 0 --num_train_epochs 16 \
    --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 \
    --zero_stage "$ZERO_STAGE" --deepspeed \
    --output_dir "$OUTPUT"
