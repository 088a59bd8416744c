"""The flags that e2e_rlhf.py gives the three steps: for the demo, tiny models and real sizes."""

# The demo: SmolLM2-135M-Instruct on film-review sentences, one entry per step. The sizes were
# chosen so that a CPU run on two cores ends in ten minutes; a GPU run has time to train longer.
DEMO_CPU = {
    1: "--learning_rate 2e-4 --freeze_layers 18 --per_device_train_batch_size 16 "
    "--per_device_eval_batch_size 32 --num_warmup_steps 2",
    2: "--learning_rate 1e-4 --freeze_layers 12 --per_device_train_batch_size 16 "
    "--per_device_eval_batch_size 32 --cut_fraction 0.5 --num_warmup_steps 4 "
    "--eval_iters 1000 --max_train_steps 48",
    3: "--actor_learning_rate 8e-5 --critic_learning_rate 8e-5 --actor_freeze_layers 18 "
    "--critic_freeze_layers 18 --per_device_generation_batch_size 32 "
    "--per_device_training_batch_size 16 --ppo_epochs 2 --per_device_eval_batch_size 64 "
    "--max_prompt_seq_len 32 --max_answer_seq_len 20 --kl_coef 0.1 --num_warmup_steps 2 "
    "--max_train_steps 12 --lr_scheduler_type constant_with_warmup --enable_hybrid_engine",
}
DEMO_GPU = {
    1: DEMO_CPU[1],
    2: "--learning_rate 1e-4 --freeze_layers 12 --per_device_train_batch_size 16 "
    "--per_device_eval_batch_size 64 --cut_fraction 0.5 --num_warmup_steps 4 "
    "--eval_iters 1000",
    3: "--actor_learning_rate 2e-5 --critic_learning_rate 2e-5 "
    "--per_device_generation_batch_size 64 --per_device_training_batch_size 32 "
    "--ppo_epochs 2 --per_device_eval_batch_size 128 --max_prompt_seq_len 32 "
    "--max_answer_seq_len 20 --kl_coef 0.1 --num_warmup_steps 4 --max_train_steps 15 "
    "--lr_scheduler_type constant_with_warmup --enable_hybrid_engine --no_compile",
}
TINY_RUN = {
    1: "--learning_rate 1e-3 --per_device_train_batch_size 8 --max_seq_len 64 --max_train_steps 20",
    2: "--learning_rate 1e-3 --per_device_train_batch_size 8 --max_seq_len 64 --max_train_steps 20",
    3: "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 "
    "--per_device_generation_batch_size 8 --per_device_training_batch_size 8 "
    "--max_prompt_seq_len 32 --max_answer_seq_len 16 --num_warmup_steps 0 --eval_prompts 32 "
    "--max_train_steps 8 --enable_hybrid_engine",
}
# One set for all published sizes. The launch scripts have DeepSpeed-Chat's own set for each size.
REAL = {
    1: "--learning_rate 9.65e-6 --num_train_epochs 1 --max_seq_len 512 "
    "--per_device_train_batch_size 4 --gradient_checkpointing "
    "--gradient_accumulation_steps 4",
    2: "--learning_rate 9.65e-6 --weight_decay 0.1 --num_train_epochs 1 --max_seq_len 512 "
    "--per_device_train_batch_size 4 --gradient_checkpointing "
    "--gradient_accumulation_steps 4",
    3: "--actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --actor_weight_decay 0.1 "
    "--critic_weight_decay 0.1 --per_device_generation_batch_size 4 "
    "--per_device_training_batch_size 4 --max_prompt_seq_len 256 --max_answer_seq_len 256 "
    "--actor_gradient_checkpointing --critic_gradient_checkpointing --num_warmup_steps 100 "
    "--enable_hybrid_engine",
}


def step_flags(
    step: int,
    *,
    kind: str,
    on_gpu: bool,
    single_gpu: bool,
    actor_stage: str,
    reward_stage: str,
    dtype: str = "",
) -> list[str]:
    """Return the flags of a step, without its model, data and output paths.

    Args:
        step: 1, 2 or 3.
        kind: "demo", "tiny" or "real".
        on_gpu: whether the step runs on GPUs.
        single_gpu: whether the step runs with one rank.
        actor_stage: ZeRO stage of the actor; "": 3 for a real size with several ranks, else 0.
        reward_stage: likewise, of the reward model and the critic.
        dtype: the precision; "": fp32 for tiny models, else auto.
    """
    table = {"demo": DEMO_GPU if on_gpu else DEMO_CPU, "tiny": TINY_RUN, "real": REAL}[kind]
    words = table[step].split()
    dtype = dtype or ("fp32" if kind == "tiny" else "")
    if dtype:
        words += ["--dtype", dtype]
    default = "0" if single_gpu or kind != "real" else "3"
    actor = actor_stage or default
    reward = reward_stage or default
    if step == 3:
        return words + ["--actor_zero_stage", actor, "--critic_zero_stage", reward]
    return words + ["--zero_stage", actor if step == 1 else reward]
