#!/usr/bin/env bash
# Step 3 under ZeRO 2 and 3, with and without Hybrid Engine, offload and LoRA, then MixZ++;
# a folder each. A run that fails does not stop the others.
source "$(dirname -- "${BASH_SOURCE[0]}")/../../../../../../scripts/_launch.sh"

positional ACTOR_PATH=AdamG012/chat-opt-1.3b-sft-deepspeed CRITIC_PATH=AdamG012/chat-opt-350m-reward-deepspeed -- "$@"
for z in 2 3; do
    for he in true false; do
        for offload in true false; do
            for lora in true false; do
                sweep_run "$ACTOR_PATH" "$CRITIC_PATH" "$z" "$z" "$he" "$offload" "$lora" false \
                    "z${z}_he_${he}_offload_${offload}_lora_${lora}"
            done
        done
    done
done
for he in true false; do
    sweep_run "$ACTOR_PATH" "$CRITIC_PATH" 3 3 "$he" false true true "z3_he_${he}_offload_false_lora_true_mpl_true"
done
sweep_end
