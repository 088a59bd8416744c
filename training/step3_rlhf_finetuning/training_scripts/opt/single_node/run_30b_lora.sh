#!/usr/bin/env bash
# An OPT-30B actor with LoRA; --actor_model_name_or_path and --critic_model_name_or_path are needed.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional -- "$@"
launch 3 all \
    --data_path Dahoas/rm-static --data_split 2,4,4 --num_padding_at_beginning 1 \
    --per_device_generation_batch_size 4 --per_device_training_batch_size 4 \
    --generation_batches 1 --ppo_epochs 1 --max_prompt_seq_len 256 --max_answer_seq_len 256 \
    --actor_learning_rate 5e-4 --critic_learning_rate 5e-6 \
    --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 100 --seed 1234 \
    --actor_gradient_checkpointing --actor_lora_dim 128 --actor_lora_alpha 1 \
    --enable_hybrid_engine --actor_zero_stage 3 --critic_zero_stage 3 --deepspeed \
    --output_dir ./output
