#!/usr/bin/env bash
# An OPT-6.7B actor on all GPUs of this machine.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional ACTOR_PATH CRITIC_PATH ACTOR_ZERO_STAGE=3 CRITIC_ZERO_STAGE=3 OUTPUT=./output -- "$@"
launch 3 all \
    --actor_model_name_or_path "$ACTOR_PATH" --critic_model_name_or_path "$CRITIC_PATH" \
    --data_path Dahoas/rm-static --data_split 2,4,4 --num_padding_at_beginning 1 \
    --per_device_generation_batch_size 4 --per_device_training_batch_size 4 \
    --generation_batches 1 --ppo_epochs 1 --max_prompt_seq_len 256 --max_answer_seq_len 256 \
    --actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_weight_decay 0.1 --critic_weight_decay 0.1 \
    --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 100 --seed 1234 \
    --actor_gradient_checkpointing \
    --enable_hybrid_engine --actor_zero_stage "$ACTOR_ZERO_STAGE" --critic_zero_stage "$CRITIC_ZERO_STAGE" --deepspeed \
    --output_dir "$OUTPUT"
