"""The option groups of step 3."""

from dataclasses import dataclass
from typing import Literal, Optional

from dschat.config.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    PromptFormat,
    RunOptions,
    ScheduleOptions,
    SystemOptions,
    flag,
)

# What step 3 saves below its output folder.
MODEL_FOLDERS = ("actor", "critic", "actor_ema")


@dataclass(frozen=True)
class PPOData(DataOptions):
    unsupervised_dataset_name: Optional[str] = flag(
        None, "Text for the PTX loss: a hub name, or a local .txt or .jsonl file with a field text."
    )
    unsupervised_dataset_config_name: Optional[str] = flag(
        None, "Configuration of the hub data set."
    )
    unsup_coef: float = flag(27.8, "Weight of the PTX loss.")
    preprocessing_num_workers: Optional[int] = flag(
        None, "Accepted for compatibility, without effect: rows are tokenised as they are read."
    )
    max_prompt_seq_len: int = flag(
        256, "Longest prompt in tokens; longer ones lose their beginning."
    )
    max_answer_seq_len: int = flag(256, "Most tokens generated per answer.")


@dataclass(frozen=True)
class PPOModels(ModelOptions):
    actor_model_name_or_path: str = flag("", "The SFT model, folder or hub id. Required.")
    critic_model_name_or_path: str = flag(
        "",
        "What the critic starts from, and the reward unless one is named below: the model of step 2. Required with "
        "--advantage_estimator gae, and where no other reward is named.",
    )
    reward_model_name_or_path: list[str] = flag(
        [],
        "Reward models instead of --critic_model_name_or_path: sequence classifiers with one label. Where the "
        "tokenizer is not the actor's, answers are decoded and tokenised again.",
    )
    reward_fn: list[str] = flag(
        [],
        "Python rewards, file.py:function(prompts, answers, **columns) -> list of floats; columns: the data's.",
    )
    reward_weights: list[float] = flag(
        [], "Weights of the rewards, models first, then functions. Default: 1 each."
    )
    reward_prompt_format: PromptFormat = flag(
        "auto", "As --prompt_format, for models that tokenise answers again."
    )
    enable_ema: bool = flag(
        False, "Keep an exponential moving average of the actor, saved as actor_ema."
    )
    ema_decay: float = flag(0.992, "Decay of that average per optimizer step.")
    num_padding_at_beginning: int = flag(
        1, "Accepted for compatibility, without effect: positions come from the attention mask."
    )

    @property
    def by_flag(self) -> dict[str, list[str]]:
        """The flags that name models, and what they name."""
        flags = ("actor_model_name_or_path", "critic_model_name_or_path")
        named = {f"--{flag}": [getattr(self, flag)] for flag in flags}
        return {**named, "--reward_model_name_or_path": self.reward_model_name_or_path}


@dataclass(frozen=True)
class PPOBatch:
    _argument_group_name = "batch"

    per_device_generation_batch_size: int = flag(16, "Prompts per process and generation batch.")
    per_device_training_batch_size: int = flag(16, "Rows per process and training micro-batch.")
    per_device_eval_batch_size: int = flag(16, "Held-out prompts per process and batch.")
    generation_batches: int = flag(1, "Generation batches per rollout.")
    ppo_epochs: int = flag(1, "Passes over each rollout.")
    num_samples_per_prompt: int = flag(
        1, "Answers sampled to each prompt; rollouts grow by this factor."
    )


@dataclass(frozen=True)
class PPOOptim:
    _argument_group_name = "optimiser"

    actor_learning_rate: float = flag(9.65e-6, "Peak learning rate of the actor.")
    critic_learning_rate: float = flag(5e-6, "Peak learning rate of the critic.")
    actor_weight_decay: float = flag(0.0, "AdamW weight decay of the actor's matrices.")
    critic_weight_decay: float = flag(0.0, "AdamW weight decay of the critic's matrices.")
    align_overflow: bool = flag(
        False,
        "Accepted for compatibility: where one engine's gradients are not finite, neither engine ever steps.",
    )
    compute_fp32_loss: bool = flag(
        False, "Accepted for compatibility: losses are always computed in fp32."
    )


@dataclass(frozen=True)
class PPOSchedule(ScheduleOptions):
    num_warmup_steps: int = flag(100, "Optimizer steps of linear warm-up.")


@dataclass(frozen=True)
class PPOLora:
    _argument_group_name = "LoRA"

    actor_lora_dim: int = flag(0, "Rank of the actor's LoRA adapters; 0: none.")
    actor_lora_module_name: Optional[str] = flag(
        None, "As --lora_module_name of step 1, for the actor."
    )
    actor_lora_alpha: float = flag(1.0, "LoRA scale of the actor: lora_alpha / lora_dim.")
    actor_lora_learning_rate: float = flag(5e-4, "Learning rate of the actor's adapters.")
    critic_lora_dim: int = flag(0, "Rank of the critic's LoRA adapters; 0: none.")
    critic_lora_module_name: Optional[str] = flag(
        None, "As --lora_module_name of step 1, for the critic."
    )
    critic_lora_alpha: float = flag(1.0, "LoRA scale of the critic: lora_alpha / lora_dim.")
    critic_lora_learning_rate: float = flag(5e-4, "Learning rate of the critic's adapters.")
    only_optimize_lora: bool = flag(
        False,
        "Of the actor and the critic, as far as they have adapters, train these and the critic's head only; one without "
        "adapters (--critic_lora_dim 0, say) trains whole.",
    )


@dataclass(frozen=True)
class PPOSystem:
    _argument_group_name = "system"

    actor_zero_stage: int = flag(0, "ZeRO stage of the actor (and the reference model), 0 to 3.")
    critic_zero_stage: int = flag(0, "ZeRO stage of the critic (and the reward model), 0 to 3.")
    offload: bool = flag(False, "Keep optimizer states (ZeRO-3: parameters too) in host memory.")
    pin_memory: bool = flag(
        True,
        "What is offloaded is page-locked, which copies faster; each buffer then takes the next power of two of bytes.",
    )
    offload_reference_model: bool = flag(
        False,
        "Keep the reference model's weights in host memory; it then runs under ZeRO-3 whatever the actor's stage.",
    )
    offload_reward_model: bool = flag(
        False,
        "Keep the reward models' weights in host memory; they then run under ZeRO-3 whatever the critic's stage.",
    )
    offload_idle_states: bool = flag(
        False,
        "Move optimizer states and fp32 master weights to host memory while answers are generated and scored.",
    )
    share_reference: bool = flag(
        True,
        "With --only_optimize_lora and an actor with adapters, the reference is the actor without them: no copy.",
    )
    share_reward: bool = flag(
        True,
        "With --only_optimize_lora and a critic with adapters, a reward model that is the critic's is the critic "
        "without them, with a head of its own: no copy.",
    )
    actor_gradient_checkpointing: bool = flag(
        False, "Recompute the actor's activations in backward."
    )
    critic_gradient_checkpointing: bool = flag(
        False, "Recompute the critic's activations in backward."
    )
    actor_dropout: Optional[float] = flag(
        None, "Accepted for compatibility: dropout is off in all four models."
    )
    critic_dropout: Optional[float] = flag(
        None, "Accepted for compatibility: dropout is off in all four models."
    )
    actor_freeze_layers: int = flag(
        0, "Freeze the actor's embeddings and this many of its lowest layers."
    )
    critic_freeze_layers: int = flag(
        0, "Freeze the critic's embeddings and this many of its lowest layers."
    )
    enable_hybrid_engine: bool = flag(
        False,
        "Generate with the Hybrid Engine: an inference replica of the actor, many times faster on a GPU.",
    )
    unpin_actor_parameters: bool = flag(
        False,
        "Hybrid Engine: free gathered and merged weights after generation, which costs time at the next.",
    )
    release_inference_cache: bool = flag(
        False,
        "Hybrid Engine: free KV cache, gathered weights and CUDA graphs after generation, which costs more time.",
    )
    cuda_graph: bool = flag(True, "Hybrid Engine: replay decode steps as CUDA graphs, on a GPU.")
    compile: bool = flag(
        True, "Hybrid Engine: compile the decoder layers of those steps with torch.compile."
    )
    hybrid_lora: Literal["merge", "attach", "auto"] = flag(
        "auto",
        "Hybrid Engine with LoRA: merged copies of adapted weights, or the low-rank products beside the shared weights; "
        "auto merges where memory allows. ZeRO-3 always merges.",
    )
    inference_tp_size: int = flag(
        1,
        "Hybrid Engine: so many processes generate together, each with a part of the layers' weights (actor ZeRO-3).",
    )
    tp_gather_partition_size: int = flag(
        8, "Hybrid Engine: layers gathered at a time, where --inference_tp_size is above 1."
    )
    enable_mixed_precision_lora: bool = flag(
        False,
        "MixZ++: keep the weights that LoRA adapts in int8, in actor, reference and critic (any ZeRO stage).",
    )


@dataclass(frozen=True)
class PPOSampling:
    _argument_group_name = "sampling"

    temperature: float = flag(
        1.0, "Sampling temperature of rollouts; logprobs are of the scaled softmax."
    )
    top_p: float = flag(1.0, "Nucleus sampling of rollouts; below 1, ratio and KL are biased.")
    top_k: int = flag(0, "Top-k sampling of rollouts; above 0, ratio and KL are biased.")
    min_answer_len: int = flag(0, "No answer ends before this many tokens.")
    greedy_rollouts: bool = flag(
        False,
        "Take the likeliest token in rollouts instead of sampling, to compare settings; PPO then explores nothing.",
    )


@dataclass(frozen=True)
class PPOAlgorithm:
    _argument_group_name = "PPO"

    kl_coef: float = flag(0.1, "Weight of the KL penalty in the reward.")
    kl_target: Optional[float] = flag(
        None, "KL per answer to steer to: makes --kl_coef, which must not be 0, adaptive."
    )
    kl_horizon: int = flag(10000, "Answers over which an adaptive coefficient reacts.")
    kl_estimator: Literal["k1", "k2", "k3"] = flag("k1", "KL estimator of the penalty.")
    reward_clip: float = flag(5.0, "Scores are clipped to +- this, in units after normalisation.")
    normalize_reward: bool = flag(
        True,
        "Divide scores by their standard deviation over the SFT model's answers to held-out prompts.",
    )
    missing_eos_penalty: float = flag(
        0.0,
        "Subtracted from the divided and clipped score of an answer that did not end by itself.",
    )
    cliprange: float = flag(0.2, "Clip range of the probability ratio.")
    cliprange_value: float = flag(
        0.2, "Clip range of the value update, in normalised reward units."
    )
    gamma: float = flag(1.0, "Discount per token.")
    lam: float = flag(0.95, "GAE lambda.")
    whiten_advantages: bool = flag(
        True,
        "Whiten advantages over the whole rollout and all processes (gae and reinforce_baseline).",
    )
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce_baseline"] = flag(
        "gae",
        "Where advantages come from: the critic (gae), or the other answers to the same prompt (no critic).",
    )
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.")
    target_kl: Optional[float] = flag(
        None,
        "End the updates on a rollout, if it has several, when the approximate KL to its policy exceeds this.",
    )
    critic_warmup_steps: int = flag(0, "Rollouts in which only the critic learns.")


@dataclass(frozen=True)
class PPORun(RunOptions):
    tensorboard_path: str = flag("step3_tensorboard", "Folder of the TensorBoard events.")
    print_answers: bool = flag(False, "Print prompts and answers of every process.")
    print_answers_interval: int = flag(1, "Rollouts between printed answers.")
    enable_test_mode: bool = flag(False, "Stop after --test_stop_step rollouts.")
    test_stop_step: int = flag(0, "Rollouts after which a test run stops.")
    eval_interval: int = flag(
        0, "Evaluate on held-out prompts every so many rollouts; 0: before and after only."
    )
    eval_prompts: int = flag(128, "Held-out prompts used in evaluation.")


def lora_twin(lora: PPOLora, role: str) -> LoraOptions:
    """The LoRA options of one role, "actor" or "critic"."""
    names = ("lora_dim", "lora_module_name", "lora_alpha", "lora_learning_rate")
    values = {name: getattr(lora, f"{role}_{name}") for name in names}
    return LoraOptions(
        only_optimize_lora=lora.only_optimize_lora and values["lora_dim"] > 0, **values
    )


def system_twin(system: PPOSystem, lora: LoraOptions, role: str) -> SystemOptions:
    """The system options of one role, whose LoRA options are `lora`."""
    names = ("zero_stage", "gradient_checkpointing", "freeze_layers")
    values = {name: getattr(system, f"{role}_{name}") for name in names}
    values["enable_mixed_precision_lora"] = system.enable_mixed_precision_lora and lora.lora_dim > 0
    return SystemOptions(
        offload=system.offload, pin_memory=system.pin_memory, dropout=0.0, **values
    )
