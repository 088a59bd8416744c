#!/usr/bin/env bash
# An OPT-13B actor with LoRA on all GPUs of this machine.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional ACTOR_PATH CRITIC_PATH ACTOR_ZERO_STAGE=3 CRITIC_ZERO_STAGE=3 OUTPUT=./output -- "$@"
launch 3 all \
    --actor_model_name_or_path "$ACTOR_PATH" --critic_model_name_or_path "$CRITIC_PATH" \
    --data_path Dahoas/rm-static --data_split 2,4,4 --num_padding_at_beginning 1 \
    --per_device_generation_batch_size 16 --per_device_training_batch_size 16 \
    --generation_batches 1 --ppo_epochs 1 --max_prompt_seq_len 256 --max_answer_seq_len 256 \
    --actor_learning_rate 5e-4 --critic_learning_rate 5e-6 \
    --num_train_epochs 1 --gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 100 --seed 1234 \
    --actor_gradient_checkpointing --actor_lora_dim 128 --actor_lora_alpha 1 --inference_tp_size 2 \
    --enable_hybrid_engine --actor_zero_stage "$ACTOR_ZERO_STAGE" --critic_zero_stage "$CRITIC_ZERO_STAGE" --deepspeed \
    --output_dir "$OUTPUT"
