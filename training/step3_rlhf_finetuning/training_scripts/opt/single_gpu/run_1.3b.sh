#!/usr/bin/env bash
# An OPT-1.3B actor with LoRA on one GPU.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../scripts/_launch.sh"

positional ACTOR_PATH CRITIC_PATH ACTOR_ZERO_STAGE=0 CRITIC_ZERO_STAGE=0 OUTPUT=./output -- "$@"
launch 3 one \
    --actor_model_name_or_path "$ACTOR_PATH" --critic_model_name_or_path "$CRITIC_PATH" \
    --num_padding_at_beginning 1 --generation_batches 2 --gradient_accumulation_steps 2 \
    --actor_lora_dim 128 --actor_lora_alpha 1 --actor_gradient_checkpointing --actor_dropout 0.0 \
    --enable_hybrid_engine --actor_zero_stage "$ACTOR_ZERO_STAGE" --critic_zero_stage "$CRITIC_ZERO_STAGE" --deepspeed \
    --output_dir "$OUTPUT"
