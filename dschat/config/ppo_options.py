"""The option groups of step 3."""

from dataclasses import dataclass
from typing import Literal, Optional

from dschat.config.options import (
    DataOptions,
    FrozenFormat,
    LoraOptions,
    ModelOptions,
    PromptFormat,
    RunOptions,
    ScheduleOptions,
    SystemOptions,
    flag,
    micro_batch_layout,
)

# The values of --reward_fn that name a grader: "numeric_match", "length_penalty(limit=200)".
GRADER = r"[a-z_]+(\(.*\))?"
# Before the name of a value that stands for a Python object: "object:my_reward".
OBJECT_PREFIX = "object:"
# Subfolders of the output folder that step 3 saves models to.
MODEL_FOLDERS = ("actor", "critic", "actor_ema")


@dataclass(frozen=True)
class PPOData(DataOptions):
    """The prompts, and the text of the PTX loss."""

    unsupervised_dataset_name: Optional[str] = flag(
        None, "Text for the PTX loss: a hub name, or a local .txt or .jsonl file with a field text."
    )
    unsupervised_dataset_config_name: Optional[str] = flag(
        None, "Configuration of the hub data set."
    )
    unsup_coef: float = flag(27.8, "Weight of the PTX loss.")
    preprocessing_num_workers: Optional[int] = flag(
        None,
        "Accepted for compatibility, no effect: the tokenizer takes all cores, once, before "
        "training.",
    )
    max_prompt_seq_len: int = flag(256, "Longest prompt in tokens; see --truncation.")
    max_answer_seq_len: int = flag(256, "Most tokens generated per answer.")


@dataclass(frozen=True)
class PPOModels(ModelOptions):
    """The models that step 3 starts from, and its rewards."""

    actor_model_name_or_path: str = flag("", "The SFT model, folder or hub id. Required.")
    critic_model_name_or_path: str = flag(
        "",
        "The model of step 2. The critic starts from it, and it is the reward model unless another "
        "reward is named below. Required with --advantage_estimator gae, and if no other reward is "
        "named.",
    )
    reward_model_name_or_path: list[str] = flag(
        [],
        "Reward models instead of --critic_model_name_or_path: sequence classifiers with one "
        "label. If a model's tokenizer is not the actor's, answers are decoded and tokenized "
        "again.",
    )
    reward_fn: list[str] = flag(
        [],
        "Rewards in Python: file.py:function(prompts, answers, **columns) -> list of numbers, None "
        "for an answer that it does not apply to; async, or a class whose objects are called, too. "
        "The columns are those of the data. Or graders by name, with options in brackets: "
        "exact_match, numeric_match, math_match, regex_match, valid_json, json_schema, "
        "length_penalty, scoring_server, llm_judge.",
    )
    on_reward_error: Literal["stop", "zero"] = flag(
        "stop",
        "If a --reward_fn raises, hangs (--reward_timeout_s) or gives NaN: stop the run, or give "
        "the answer 0 and count it in the metrics. May change on --resume.",
    )
    reward_workers: int = flag(
        0,
        "Processes on each rank that call each --reward_fn, with a part of the answers each; 0: "
        "call it in the run's own process.",
    )
    reward_timeout_s: float = flag(
        0.0,
        "With --reward_workers: seconds that one call of a --reward_fn may take before "
        "--on_reward_error applies to the answer on which it hangs; 0: no limit.",
    )
    reward_weights: list[float] = flag(
        [], "Weights of the rewards, models first, then functions. Default: 1 each."
    )
    reward_prompt_format: PromptFormat = flag(
        "auto", "Like --prompt_format, for reward models that tokenize answers again."
    )
    enable_ema: bool = flag(
        False, "Keep an exponential moving average of the actor, saved as actor_ema."
    )
    ema_decay: float = flag(0.992, "Decay of that average per optimizer step.")
    num_padding_at_beginning: int = flag(
        1, "Accepted for compatibility, no effect: positions come from the attention mask."
    )

    @property
    def by_flag(self) -> dict[str, list[str]]:
        """The flags that name models, and their values."""
        return {
            "--actor_model_name_or_path": [self.actor_model_name_or_path],
            "--critic_model_name_or_path": [self.critic_model_name_or_path],
            "--reward_model_name_or_path": self.reward_model_name_or_path,
        }


@dataclass(frozen=True)
class PPOBatch:
    """Sizes of rollouts and batches."""

    _argument_group_name = "batch"

    per_device_generation_batch_size: int = flag(16, "Prompts per rank and generation batch.")
    per_device_training_batch_size: int = flag(16, "Rows per rank and training micro-batch.")
    per_device_eval_batch_size: int = flag(16, "Held-out prompts per rank and batch.")
    scoring_tokens_per_batch: int = flag(
        0,
        "Score the answers of a generation batch in parts of like length with at most this many "
        "tokens, padding included; 0: all at once.",
    )
    training_tokens_per_batch: int = flag(
        0,
        "Divide the rows of an update into micro-batches of like length with at most this many "
        "tokens, padding included; 0: into micro-batches of --per_device_training_batch_size rows.",
    )
    generation_batches: int = flag(1, "Generation batches per rollout.")
    ppo_epochs: int = flag(1, "Passes over each rollout.")
    num_samples_per_prompt: int = flag(
        1, "Answers sampled per prompt; rollouts grow by this factor."
    )

    def layout(self, accumulation: int) -> tuple[int, int]:
        """Return the rows of a micro-batch and the micro-batches of an update, for DeepSpeed.

        Args:
            accumulation: value of --gradient_accumulation_steps.
        """
        return micro_batch_layout(
            self.per_device_training_batch_size, accumulation, tokens=self.training_tokens_per_batch
        )


@dataclass(frozen=True)
class PPOOptim:
    """The optimizers of the actor and the critic."""

    _argument_group_name = "optimiser"

    actor_learning_rate: float = flag(9.65e-6, "Peak learning rate of the actor.")
    critic_learning_rate: float = flag(5e-6, "Peak learning rate of the critic.")
    actor_weight_decay: float = flag(0.0, "AdamW weight decay of the actor's matrices.")
    critic_weight_decay: float = flag(0.0, "AdamW weight decay of the critic's matrices.")
    align_overflow: bool = flag(
        False,
        "Accepted for compatibility, no effect: if one engine's gradients are not finite, neither "
        "engine steps.",
    )
    compute_fp32_loss: bool = flag(
        False, "Accepted for compatibility, no effect: losses are always computed in fp32."
    )


@dataclass(frozen=True)
class PPOSchedule(ScheduleOptions):
    """The schedule of step 3."""

    num_warmup_steps: int = flag(100, "Optimizer steps of linear warm-up.")


@dataclass(frozen=True)
class PPOLora:
    """LoRA of the actor and the critic."""

    _argument_group_name = "LoRA"

    actor_lora_dim: int = flag(0, "Rank of the actor's LoRA adapters; 0: no adapters.")
    actor_lora_module_name: Optional[str] = flag(
        None, "Like --lora_module_name of step 1, for the actor."
    )
    actor_target_modules: list[str] = flag([], "Like --target_modules of step 1, for the actor.")
    actor_modules_to_save: list[str] = flag([], "Like --modules_to_save of step 1, for the actor.")
    actor_lora_alpha: float = flag(1.0, "LoRA scale of the actor: lora_alpha / lora_dim.")
    actor_lora_learning_rate: float = flag(5e-4, "Learning rate of the actor's adapters.")
    critic_lora_dim: int = flag(0, "Rank of the critic's LoRA adapters; 0: no adapters.")
    critic_lora_module_name: Optional[str] = flag(
        None, "Like --lora_module_name of step 1, for the critic."
    )
    critic_target_modules: list[str] = flag([], "Like --target_modules of step 1, for the critic.")
    critic_modules_to_save: list[str] = flag(
        [], "Like --modules_to_save of step 1, for the critic."
    )
    critic_lora_alpha: float = flag(1.0, "LoRA scale of the critic: lora_alpha / lora_dim.")
    critic_lora_learning_rate: float = flag(5e-4, "Learning rate of the critic's adapters.")
    use_rslora: bool = flag(
        False,
        "Multiply by lora_alpha / sqrt(lora_dim) instead (rsLoRA), for high ranks.",
    )
    only_optimize_lora: bool = flag(
        False,
        "Train only the adapters and the critic's head. A model without adapters (for example with "
        "--critic_lora_dim 0) is trained in full.",
    )
    lora_experts: bool = flag(True, "Like --lora_experts of step 1, for the actor and the critic.")

    @property
    def actor(self) -> LoraOptions:
        """The actor's options."""
        return LoraOptions(
            lora_dim=self.actor_lora_dim,
            lora_module_name=self.actor_lora_module_name,
            target_modules=self.actor_target_modules,
            modules_to_save=self.actor_modules_to_save,
            lora_alpha=self.actor_lora_alpha,
            use_rslora=self.use_rslora,
            lora_learning_rate=self.actor_lora_learning_rate,
            only_optimize_lora=self.only_optimize_lora and self.actor_lora_dim > 0,
            lora_experts=self.lora_experts,
        )

    @property
    def critic(self) -> LoraOptions:
        """The critic's options."""
        return LoraOptions(
            lora_dim=self.critic_lora_dim,
            lora_module_name=self.critic_lora_module_name,
            target_modules=self.critic_target_modules,
            modules_to_save=self.critic_modules_to_save,
            lora_alpha=self.critic_lora_alpha,
            use_rslora=self.use_rslora,
            lora_learning_rate=self.critic_lora_learning_rate,
            only_optimize_lora=self.only_optimize_lora and self.critic_lora_dim > 0,
            lora_experts=self.lora_experts,
        )


@dataclass(frozen=True)
class PPOSystem:
    """ZeRO, offloading and the Hybrid Engine of the four models."""

    _argument_group_name = "system"

    actor_zero_stage: int = flag(0, "ZeRO stage of the actor (and the reference model), 0 to 3.")
    critic_zero_stage: int = flag(0, "ZeRO stage of the critic (and the reward model), 0 to 3.")
    offload: bool = flag(False, "Keep optimizer states (ZeRO-3: parameters too) in host memory.")
    pin_memory: bool = flag(
        True,
        "Page-lock offloaded memory. Copies are faster, but each buffer is rounded up to the next "
        "power of two bytes.",
    )
    offload_reference_model: bool = flag(
        False,
        "Keep the reference model's weights in host memory. It then runs under ZeRO-3, whatever "
        "the actor's stage.",
    )
    offload_reward_model: bool = flag(
        False,
        "Keep the reward models' weights in host memory. They then run under ZeRO-3, whatever the "
        "critic's stage.",
    )
    offload_idle_states: bool = flag(
        False,
        "Move optimizer states and fp32 master weights to host memory while answers are generated "
        "and scored.",
    )
    share_reference: bool = flag(
        True,
        "With --only_optimize_lora and an actor with adapters: use the actor without its adapters "
        "as the reference, instead of a copy.",
    )
    share_reward: bool = flag(
        True,
        "With --only_optimize_lora and a critic with adapters: if the reward model is the critic's "
        "model, use the critic without its adapters and with another head, instead of a copy.",
    )
    actor_gradient_checkpointing: bool = flag(
        False, "Recompute the actor's activations in backward."
    )
    critic_gradient_checkpointing: bool = flag(
        False, "Recompute the critic's activations in backward."
    )
    compile_layers: bool = flag(
        False,
        "On a GPU, train with compiled decoder layers: updates are up to a tenth faster, and the "
        "first takes about a minute longer. No effect under ZeRO-3 and with --quantize_frozen.",
    )
    actor_dropout: Optional[float] = flag(
        None, "Accepted for compatibility, no effect: dropout is off in all four models."
    )
    critic_dropout: Optional[float] = flag(
        None, "Accepted for compatibility, no effect: dropout is off in all four models."
    )
    actor_freeze_layers: int = flag(
        0, "Freeze the actor's embeddings and this many of its lowest layers."
    )
    critic_freeze_layers: int = flag(
        0, "Freeze the critic's embeddings and this many of its lowest layers."
    )
    enable_hybrid_engine: bool = flag(
        False,
        "Generate with the Hybrid Engine: an inference replica of the actor, many times faster on "
        "a GPU.",
    )
    unpin_actor_parameters: bool = flag(
        False,
        "Hybrid Engine: free gathered and merged weights after generation. The next generation "
        "has to gather and merge them again.",
    )
    release_inference_cache: bool = flag(
        False,
        "Hybrid Engine: free KV cache, gathered weights and CUDA graphs after generation. Slower "
        "than --unpin_actor_parameters.",
    )
    cuda_graph: bool = flag(True, "Hybrid Engine: replay decode steps as CUDA graphs, on a GPU.")
    compile: bool = flag(
        True, "Hybrid Engine: compile the decoder layers of those steps with torch.compile."
    )
    generation_slots: int = flag(
        0,
        "Hybrid Engine: this many answers decode together, and one that ends makes room for the "
        "next prompt of the rollout. Samples do not depend on the number. 0: each generation batch "
        "is decoded by itself.",
    )
    generation_cache_gib: float = flag(
        0.0,
        "Hybrid Engine with --generation_slots: GiB of key-value cache on each device. Answers "
        "take as much of it as they have tokens; if it is full, the newest wait. 0: as much as "
        "all slots need at their longest.",
    )
    hybrid_lora: Literal["merge", "attach", "auto"] = flag(
        "auto",
        "Hybrid Engine with LoRA: merge (merged copies of the adapted weights), attach (low-rank "
        "products beside the shared weights), or auto (merge if memory allows). ZeRO-3 always "
        "merges.",
    )
    inference_tp_size: int = flag(
        1,
        "Hybrid Engine: this many ranks generate together, each with a part of every layer's "
        "weights (needs actor ZeRO-3).",
    )
    tp_gather_partition_size: int = flag(
        8, "Hybrid Engine: layers gathered at a time if --inference_tp_size is above 1."
    )
    enable_mixed_precision_lora: bool = flag(
        False,
        "MixZ++: the same as --quantize_frozen int8.",
    )
    quantize_frozen: FrozenFormat = flag(
        "none",
        "Keep the weights that LoRA adapts in int8 (half the memory of bf16) or nf4 (a quarter), "
        "in actor, reference and critic, and all linear layers of reward models. They are rounded "
        "once, at the start. Any ZeRO stage.",
    )

    def actor(self, lora: LoraOptions) -> SystemOptions:
        """Return the actor's options; `lora` are its LoRA options."""
        return SystemOptions(
            zero_stage=self.actor_zero_stage,
            offload=self.offload,
            pin_memory=self.pin_memory,
            gradient_checkpointing=self.actor_gradient_checkpointing,
            compile_layers=self.compile_layers,
            dropout=0.0,
            freeze_layers=self.actor_freeze_layers,
            enable_mixed_precision_lora=self.enable_mixed_precision_lora and lora.lora_dim > 0,
            quantize_frozen=self.quantize_frozen if lora.lora_dim > 0 else "none",
        )

    def critic(self, lora: LoraOptions) -> SystemOptions:
        """Return the critic's options; `lora` are its LoRA options."""
        return SystemOptions(
            zero_stage=self.critic_zero_stage,
            offload=self.offload,
            pin_memory=self.pin_memory,
            gradient_checkpointing=self.critic_gradient_checkpointing,
            compile_layers=self.compile_layers,
            dropout=0.0,
            freeze_layers=self.critic_freeze_layers,
            enable_mixed_precision_lora=self.enable_mixed_precision_lora and lora.lora_dim > 0,
            quantize_frozen=self.quantize_frozen if lora.lora_dim > 0 else "none",
        )


@dataclass(frozen=True)
class PPOSampling:
    """Sampling of rollouts."""

    _argument_group_name = "sampling"

    temperature: float = flag(
        1.0, "Sampling temperature of rollouts; logprobs are of the scaled softmax."
    )
    top_p: float = flag(1.0, "Nucleus sampling of rollouts; below 1, ratio and KL are biased.")
    top_k: int = flag(0, "Top-k sampling of rollouts; above 0, ratio and KL are biased.")
    min_answer_len: int = flag(0, "Fewest tokens of an answer.")
    greedy_rollouts: bool = flag(
        False,
        "Take the likeliest token in rollouts instead of sampling, to compare settings. PPO then "
        "explores nothing.",
    )


@dataclass(frozen=True)
class PPOAlgorithm:
    """The algorithm: rewards, KL penalty, advantages and losses."""

    _argument_group_name = "PPO"

    kl_coef: float = flag(0.1, "Weight of the KL penalty in the reward.")
    kl_target: Optional[float] = flag(
        None, "Target KL per answer. Makes --kl_coef adaptive, which must not be 0."
    )
    kl_horizon: int = flag(10000, "Answers over which an adaptive coefficient reacts.")
    kl_estimator: Literal["k1", "k2", "k3"] = flag("k1", "KL estimator of the penalty.")
    reward_clip: float = flag(5.0, "Clip scores to +- this value, after normalization.")
    normalize_reward: bool = flag(
        True,
        "Divide scores by their standard deviation over the SFT model's answers to held-out "
        "prompts.",
    )
    missing_eos_penalty: float = flag(
        0.0, "Subtracted from the normalized, clipped score of an answer without an end token."
    )
    cliprange: float = flag(0.2, "Clip range of the probability ratio.")
    cliprange_value: float = flag(
        0.2, "Clip range of the value update, in units of the normalized reward."
    )
    gamma: float = flag(1.0, "Discount per token.")
    lam: float = flag(0.95, "GAE lambda.")
    whiten_advantages: bool = flag(
        True,
        "Whiten advantages over the whole rollout and all ranks (gae and reinforce_baseline).",
    )
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce_baseline"] = flag(
        "gae",
        "Source of the advantages: the critic (gae), or the other answers to the same prompt (all "
        "others, which have no critic).",
    )
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.")
    router_aux_loss_coef: float = flag(0.0, "Like --router_aux_loss_coef of step 1, for the actor.")
    target_kl: Optional[float] = flag(
        None,
        "Skip the remaining updates of a rollout when the approximate KL to the policy that "
        "sampled it exceeds this.",
    )
    critic_warmup_steps: int = flag(0, "Rollouts in which only the critic learns.")


@dataclass(frozen=True)
class PPORun(RunOptions):
    """Output, evaluation and test runs of step 3."""

    tensorboard_path: str = flag("step3_tensorboard", "Folder of the TensorBoard events.")
    print_answers: bool = flag(False, "Print prompts and answers of every rank.")
    print_answers_interval: int = flag(1, "Print answers every so many rollouts.")
    save_rollouts: int = flag(
        0,
        "Write prompts, answers and their scores to rollouts/ in --output_dir every so many "
        "rollouts, for python -m dschat.rollouts; 0: never.",
    )
    enable_test_mode: bool = flag(False, "Stop after --test_stop_step rollouts.")
    test_stop_step: int = flag(0, "Rollouts after which a test run stops.")
    eval_interval: int = flag(
        0, "Evaluate on held-out prompts every so many rollouts; 0: before and after training only."
    )
    eval_prompts: int = flag(128, "Held-out prompts used in evaluation.")
