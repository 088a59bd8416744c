#!/usr/bin/env bash
# One run of the sweep: an OPT-1.3B actor on all GPUs of this machine, the switches true or false.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../../scripts/_launch.sh"

positional ACTOR_PATH CRITIC_PATH ACTOR_ZERO_STAGE=2 CRITIC_ZERO_STAGE=2 HYBRID=false OFFLOAD=false LORA=false \
    MIXED_PRECISION_LORA=false OUTPUT=./output TEST=false TEST_STOP_STEP=0 -- "$@"
switch HYBRID --enable_hybrid_engine
switch OFFLOAD --offload
switch LORA --actor_lora_dim 128 --actor_lora_alpha 1
switch MIXED_PRECISION_LORA --enable_mixed_precision_lora
switch TEST --enable_test_mode --test_stop_step "$TEST_STOP_STEP"
launch 3 all \
    --actor_model_name_or_path "$ACTOR_PATH" --critic_model_name_or_path "$CRITIC_PATH" \
    --data_path Dahoas/rm-static --data_split 2,4,4 --num_padding_at_beginning 1 \
    --per_device_generation_batch_size 4 --per_device_training_batch_size 4 \
    --generation_batches 1 --ppo_epochs 1 --max_prompt_seq_len 256 --max_answer_seq_len 256 \
    --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_dropout 0.0 --print_answers \
    --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 100 --seed 1234 \
    --actor_zero_stage "$ACTOR_ZERO_STAGE" --critic_zero_stage "$CRITIC_ZERO_STAGE" --deepspeed \
    --output_dir "$OUTPUT" "${SWITCHED[@]}"
