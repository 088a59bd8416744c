"""One frozen dataclass a step: its option groups, the checks across them, and the sizes that follow from them."""

from dataclasses import dataclass
from typing import Literal, Optional

from dschat.config.checks import above, at_least, in_range, required, zero_stage
from dschat.config.options import (
    BatchOptions,
    DataOptions,
    LoraOptions,
    ModelOptions,
    OneModelOptions,
    OptimOptions,
    RunOptions,
    ScheduleOptions,
    SystemOptions,
    flag,
)


@dataclass(frozen=True)
class SFTData(DataOptions):
    sft_only_data_path: list[str] = flag([], "Data sets used for this step only, whole.")
    max_seq_len: int = flag(512, "Longest text in tokens; longer prompts lose their beginning.")


@dataclass(frozen=True)
class SFTRun(RunOptions):
    tensorboard_path: str = flag("step1_tensorboard", "Folder of the TensorBoard events.")
    print_loss: bool = flag(False, "Print the loss of every optimizer step.")


@dataclass(frozen=True)
class SFTConfig:
    """Step 1, supervised fine-tuning."""

    data: SFTData
    model: OneModelOptions
    batch: BatchOptions
    optim: OptimOptions
    schedule: ScheduleOptions
    lora: LoraOptions
    system: SystemOptions
    run: SFTRun

    def problems(self) -> list[str]:
        """Everything that is wrong with these options, one sentence each."""
        return _single_model_problems(self)


@dataclass(frozen=True)
class RewardData(DataOptions):
    max_seq_len: int = flag(512, "Longest text in tokens; longer prompts lose their beginning.")
    cut_fraction: float = flag(
        0.0,
        "Share of the training pairs whose two answers are cut to one random length, without end token, so that "
        "unfinished answers are scored too.",
    )


@dataclass(frozen=True)
class RewardOptim(OptimOptions):
    learning_rate: float = flag(5e-5, "Peak learning rate of the base weights.")


@dataclass(frozen=True)
class RewardRun(RunOptions):
    tensorboard_path: str = flag("step2_tensorboard", "Folder of the TensorBoard events.")
    eval_interval: int = flag(0, "Evaluate every so many optimizer steps; 0: before, and after each epoch.")
    eval_iters: int = flag(100, "Evaluate on at most this many batches per process.")
    num_padding_at_beginning: int = flag(
        1, "Accepted for compatibility, without effect: positions come from the attention mask."
    )


@dataclass(frozen=True)
class RewardConfig:
    """Step 2, reward model."""

    data: RewardData
    model: OneModelOptions
    batch: BatchOptions
    optim: RewardOptim
    schedule: ScheduleOptions
    lora: LoraOptions
    system: SystemOptions
    run: RewardRun

    def problems(self) -> list[str]:
        """Everything that is wrong with these options, one sentence each."""
        found = _single_model_problems(self)
        found += in_range("--cut_fraction", self.data.cut_fraction, 0.0, 1.0)
        found += at_least("--eval_interval", self.run.eval_interval, 0)
        found += at_least("--eval_iters", self.run.eval_iters, 1)
        return found


@dataclass(frozen=True)
class PPOData(DataOptions):
    unsupervised_dataset_name: Optional[str] = flag(
        None, "Text for the PTX loss: a hub name, or a local .txt or .jsonl file with a field text."
    )
    unsupervised_dataset_config_name: Optional[str] = flag(None, "Configuration of the hub data set.")
    unsup_coef: float = flag(27.8, "Weight of the PTX loss.")
    preprocessing_num_workers: Optional[int] = flag(
        None, "Accepted for compatibility, without effect: rows are tokenised as they are read."
    )
    max_prompt_seq_len: int = flag(256, "Longest prompt in tokens; longer ones lose their beginning.")
    max_answer_seq_len: int = flag(256, "Most tokens generated per answer.")


@dataclass(frozen=True)
class PPOModels(ModelOptions):
    actor_model_name_or_path: str = flag("", "The SFT model, folder or hub id. Required.")
    critic_model_name_or_path: str = flag("", "The reward model; the critic starts from it. Required.")
    enable_ema: bool = flag(False, "Keep an exponential moving average of the actor, saved as actor_ema.")
    ema_decay: float = flag(0.992, "Decay of that average per optimizer step.")
    num_padding_at_beginning: int = flag(
        1, "Accepted for compatibility, without effect: positions come from the attention mask."
    )


@dataclass(frozen=True)
class PPOBatch:
    _argument_group_name = "batch"

    per_device_generation_batch_size: int = flag(16, "Prompts per process and generation batch.")
    per_device_training_batch_size: int = flag(16, "Rows per process and training micro-batch.")
    per_device_eval_batch_size: int = flag(32, "Held-out prompts per process and batch.")
    generation_batches: int = flag(1, "Generation batches per rollout.")
    ppo_epochs: int = flag(1, "Passes over each rollout.")


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
    compute_fp32_loss: bool = flag(False, "Accepted for compatibility: losses are always computed in fp32.")


@dataclass(frozen=True)
class PPOSchedule(ScheduleOptions):
    num_warmup_steps: int = flag(100, "Optimizer steps of linear warm-up.")


@dataclass(frozen=True)
class PPOLora:
    _argument_group_name = "LoRA"

    actor_lora_dim: int = flag(0, "Rank of the actor's LoRA adapters; 0: none.")
    actor_lora_module_name: Optional[str] = flag(None, "As --lora_module_name of step 1, for the actor.")
    actor_lora_alpha: float = flag(1.0, "LoRA scale of the actor: lora_alpha / lora_dim.")
    actor_lora_learning_rate: float = flag(5e-4, "Learning rate of the actor's adapters.")
    critic_lora_dim: int = flag(0, "Rank of the critic's LoRA adapters; 0: none.")
    critic_lora_module_name: Optional[str] = flag(None, "As --lora_module_name of step 1, for the critic.")
    critic_lora_alpha: float = flag(1.0, "LoRA scale of the critic: lora_alpha / lora_dim.")
    critic_lora_learning_rate: float = flag(5e-4, "Learning rate of the critic's adapters.")
    only_optimize_lora: bool = flag(False, "Train the adapters and the critic's head only.")


@dataclass(frozen=True)
class PPOSystem:
    _argument_group_name = "system"

    actor_zero_stage: int = flag(0, "ZeRO stage of the actor (and the reference model), 0 to 3.")
    critic_zero_stage: int = flag(0, "ZeRO stage of the critic (and the reward model), 0 to 3.")
    offload: bool = flag(False, "Keep optimizer states (ZeRO-3: parameters too) in host memory.")
    offload_reference_model: bool = flag(False, "Keep the reference model's weights in host memory (ZeRO-3).")
    offload_reward_model: bool = flag(False, "Keep the reward model's weights in host memory (ZeRO-3).")
    actor_gradient_checkpointing: bool = flag(False, "Recompute the actor's activations in backward.")
    critic_gradient_checkpointing: bool = flag(False, "Recompute the critic's activations in backward.")
    actor_dropout: Optional[float] = flag(None, "Accepted for compatibility: dropout is off in all four models.")
    critic_dropout: Optional[float] = flag(None, "Accepted for compatibility: dropout is off in all four models.")
    actor_freeze_layers: int = flag(0, "Freeze the actor's embeddings and this many of its lowest layers.")
    critic_freeze_layers: int = flag(0, "Freeze the critic's embeddings and this many of its lowest layers.")
    enable_hybrid_engine: bool = flag(False, "Generate with the Hybrid Engine.")
    unpin_actor_parameters: bool = flag(False, "Hybrid Engine: free the gathered parameters after generation.")
    release_inference_cache: bool = flag(False, "Hybrid Engine: free the KV cache after generation.")
    inference_tp_size: int = flag(1, "Hybrid Engine: tensor-parallel processes in generation (actor ZeRO-3).")
    tp_gather_partition_size: int = flag(8, "Hybrid Engine: layers gathered at a time under tensor parallelism.")
    enable_mixed_precision_lora: bool = flag(False, "MixZ++: quantise frozen weights (actor LoRA and ZeRO-3).")


@dataclass(frozen=True)
class PPOSampling:
    _argument_group_name = "sampling"

    temperature: float = flag(1.0, "Sampling temperature of rollouts; logprobs are of the scaled softmax.")
    top_p: float = flag(1.0, "Nucleus sampling of rollouts; below 1, ratio and KL are biased.")
    top_k: int = flag(0, "Top-k sampling of rollouts; above 0, ratio and KL are biased.")
    min_answer_len: int = flag(0, "No answer ends before this many tokens.")


@dataclass(frozen=True)
class PPOAlgorithm:
    _argument_group_name = "PPO"

    kl_coef: float = flag(0.1, "Weight of the KL penalty in the reward.")
    kl_target: Optional[float] = flag(None, "KL per answer to steer to: makes --kl_coef adaptive.")
    kl_horizon: int = flag(10000, "Answers over which an adaptive coefficient reacts.")
    kl_estimator: Literal["k1", "k2", "k3"] = flag("k1", "KL estimator of the penalty.")
    reward_clip: float = flag(5.0, "Scores are clipped to +- this, in units after normalisation.")
    normalize_reward: bool = flag(
        True, "Divide scores by their standard deviation over the SFT model's answers to held-out prompts."
    )
    missing_eos_penalty: float = flag(0.0, "Subtracted from the score of an answer that did not end by itself.")
    cliprange: float = flag(0.2, "Clip range of the probability ratio.")
    cliprange_value: float = flag(0.2, "Clip range of the value update, in normalised reward units.")
    gamma: float = flag(1.0, "Discount per token.")
    lam: float = flag(0.95, "GAE lambda.")
    whiten_advantages: bool = flag(True, "Whiten advantages over the whole rollout and all processes.")
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.")
    target_kl: Optional[float] = flag(
        None, "Stop the remaining epochs of a rollout when the approximate KL to its policy exceeds this."
    )
    critic_warmup_steps: int = flag(0, "Rollouts in which only the critic learns.")


@dataclass(frozen=True)
class PPORun(RunOptions):
    tensorboard_path: str = flag("step3_tensorboard", "Folder of the TensorBoard events.")
    print_answers: bool = flag(False, "Print prompts and answers of every process.")
    print_answers_interval: int = flag(1, "Rollouts between printed answers.")
    enable_test_mode: bool = flag(False, "Stop after --test_stop_step rollouts.")
    test_stop_step: int = flag(0, "Rollouts after which a test run stops.")
    eval_interval: int = flag(0, "Evaluate on held-out prompts every so many rollouts; 0: before and after only.")
    eval_prompts: int = flag(128, "Held-out prompts used in evaluation.")


@dataclass(frozen=True)
class PPOConfig:
    """Step 3, PPO."""

    data: PPOData
    model: PPOModels
    batch: PPOBatch
    optim: PPOOptim
    schedule: PPOSchedule
    lora: PPOLora
    system: PPOSystem
    sampling: PPOSampling
    ppo: PPOAlgorithm
    run: PPORun

    @property
    def actor_lora(self) -> LoraOptions:
        return _lora_twin(self.lora, "actor")

    @property
    def critic_lora(self) -> LoraOptions:
        return _lora_twin(self.lora, "critic")

    @property
    def actor_system(self) -> SystemOptions:
        return _system_twin(self.system, "actor")

    @property
    def critic_system(self) -> SystemOptions:
        return _system_twin(self.system, "critic")

    @property
    def rollout_rows(self) -> int:
        """Answers per process and rollout."""
        return self.batch.per_device_generation_batch_size * self.batch.generation_batches

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        window = self.batch.per_device_training_batch_size * self.schedule.gradient_accumulation_steps
        return self.rollout_rows // window * self.batch.ppo_epochs

    def problems(self) -> list[str]:
        """Everything that is wrong with these options, one sentence each."""
        found = required("--actor_model_name_or_path", self.model.actor_model_name_or_path)
        found += required("--critic_model_name_or_path", self.model.critic_model_name_or_path)
        found += _data_problems(self.data) + _schedule_problems(self.schedule)
        for name in ("actor_zero_stage", "critic_zero_stage"):
            found += zero_stage("--" + name, getattr(self.system, name))
        for role in ("actor", "critic"):
            found += _lora_problems(getattr(self, f"{role}_lora"), prefix=f"--{role}_")
            for name in (f"{role}_learning_rate", f"{role}_weight_decay"):
                found += at_least("--" + name, getattr(self.optim, name), 0)
            found += at_least(f"--{role}_freeze_layers", getattr(self.system, f"{role}_freeze_layers"), 0)
        if self.lora.only_optimize_lora and not (self.lora.actor_lora_dim or self.lora.critic_lora_dim):
            found.append("--only_optimize_lora needs adapters: give --actor_lora_dim or --critic_lora_dim.")
        return found + self._batch_problems() + self._system_problems() + self._algorithm_problems()

    def _batch_problems(self) -> list[str]:
        found = []
        for name in (
            "per_device_generation_batch_size",
            "per_device_training_batch_size",
            "per_device_eval_batch_size",
            "generation_batches",
            "ppo_epochs",
        ):
            found += at_least("--" + name, getattr(self.batch, name), 1)
        for name in ("max_prompt_seq_len", "max_answer_seq_len"):
            found += at_least("--" + name, getattr(self.data, name), 1)
        window = self.batch.per_device_training_batch_size * self.schedule.gradient_accumulation_steps
        if not found and self.rollout_rows % window:
            found.append(
                f"A rollout of {self.rollout_rows} rows per process (--per_device_generation_batch_size x "
                f"--generation_batches) is no multiple of an optimizer step of {window} rows "
                "(--per_device_training_batch_size x --gradient_accumulation_steps): change one of the four."
            )
        return found

    def _system_problems(self) -> list[str]:
        found = []
        system = self.system
        if system.inference_tp_size > 1 and system.actor_zero_stage != 3:
            found.append(
                f"--inference_tp_size {system.inference_tp_size} needs --actor_zero_stage 3, "
                f"not {system.actor_zero_stage}."
            )
        if system.enable_mixed_precision_lora and not (self.lora.actor_lora_dim and system.actor_zero_stage == 3):
            found.append("--enable_mixed_precision_lora needs --actor_lora_dim above 0 and --actor_zero_stage 3.")
        return found

    def _algorithm_problems(self) -> list[str]:
        ppo, sampling, found = self.ppo, self.sampling, []
        for name in ("kl_coef", "missing_eos_penalty", "entropy_coef", "critic_warmup_steps"):
            found += at_least("--" + name, getattr(ppo, name), 0)
        for name in ("reward_clip", "cliprange", "cliprange_value", "kl_horizon"):
            found += above("--" + name, getattr(ppo, name), 0)
        for name in ("gamma", "lam"):
            found += in_range("--" + name, getattr(ppo, name), 0.0, 1.0)
        for name in ("kl_target", "target_kl"):
            if getattr(ppo, name) is not None:
                found += above("--" + name, getattr(ppo, name), 0)
        found += above("--temperature", sampling.temperature, 0)
        found += above("--top_p", sampling.top_p, 0) + in_range("--top_p", sampling.top_p, 0.0, 1.0)
        found += at_least("--top_k", sampling.top_k, 0)
        found += in_range("--min_answer_len", sampling.min_answer_len, 0, self.data.max_answer_seq_len)
        found += in_range("--ema_decay", self.model.ema_decay, 0.0, 1.0)
        found += at_least("--unsup_coef", self.data.unsup_coef, 0)
        found += at_least("--eval_interval", self.run.eval_interval, 0)
        found += at_least("--test_stop_step", self.run.test_stop_step, 0)
        found += at_least("--eval_prompts", self.run.eval_prompts, 2)
        found += at_least("--print_answers_interval", self.run.print_answers_interval, 1)
        return found


def _lora_twin(lora: PPOLora, role: str) -> LoraOptions:
    names = ("lora_dim", "lora_module_name", "lora_alpha", "lora_learning_rate")
    values = {name: getattr(lora, f"{role}_{name}") for name in names}
    return LoraOptions(only_optimize_lora=lora.only_optimize_lora and values["lora_dim"] > 0, **values)


def _system_twin(system: PPOSystem, role: str) -> SystemOptions:
    names = ("zero_stage", "gradient_checkpointing", "freeze_layers")
    values = {name: getattr(system, f"{role}_{name}") for name in names}
    return SystemOptions(offload=system.offload, dropout=0.0, **values)


def _single_model_problems(config) -> list[str]:
    found = required("--model_name_or_path", config.model.model_name_or_path)
    found += _data_problems(config.data) + _schedule_problems(config.schedule)
    found += zero_stage("--zero_stage", config.system.zero_stage)
    found += _lora_problems(config.lora)
    if config.lora.only_optimize_lora and config.lora.lora_dim == 0:
        found.append("--only_optimize_lora needs adapters: give --lora_dim above 0.")
    found += at_least("--freeze_layers", config.system.freeze_layers, 0)
    for name in ("learning_rate", "weight_decay"):
        found += at_least("--" + name, getattr(config.optim, name), 0)
    found += at_least("--max_seq_len", config.data.max_seq_len, 2)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        found += at_least("--" + name, getattr(config.batch, name), 1)
    if config.system.dropout is not None:
        found += in_range("--dropout", config.system.dropout, 0.0, 1.0)
    return found


def _lora_problems(lora: LoraOptions, *, prefix: str = "--") -> list[str]:
    found = at_least(f"{prefix}lora_dim", lora.lora_dim, 0)
    found += above(f"{prefix}lora_alpha", lora.lora_alpha, 0)
    return found + at_least(f"{prefix}lora_learning_rate", lora.lora_learning_rate, 0)


def _data_problems(data: DataOptions) -> list[str]:
    found = [] if data.data_path else ["--data_path names no data set."]
    return found + above("--eval_fraction", data.eval_fraction, 0) + in_range(
        "--eval_fraction", data.eval_fraction, 0.0, 0.9
    )


def _schedule_problems(schedule: ScheduleOptions) -> list[str]:
    found = at_least("--gradient_accumulation_steps", schedule.gradient_accumulation_steps, 1)
    found += at_least("--num_train_epochs", schedule.num_train_epochs, 0)
    found += at_least("--max_train_steps", schedule.max_train_steps, 0)
    return found + at_least("--num_warmup_steps", schedule.num_warmup_steps, 0)
