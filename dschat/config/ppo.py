"""The configuration of step 3, PPO: its option groups, the checks across them and derived sizes."""

import math
import re
from dataclasses import dataclass

from dschat.config.group_checks import (
    data_problems,
    frozen_format_problems,
    lora_problems,
    output_problems,
    schedule_problems,
    tokens_per_batch_problems,
)
from dschat.config.options import FrozenFormat, LoraOptions, SystemOptions
from dschat.config.ppo_objective import PPOObjective, objective_problems
from dschat.config.ppo_options import (
    GRADER,
    MODEL_FOLDERS,
    OBJECT_PREFIX,
    PPOAlgorithm,
    PPOBatch,
    PPOData,
    PPOLora,
    PPOModels,
    PPOOptim,
    PPORun,
    PPOSampling,
    PPOSchedule,
    PPOSystem,
)
from dschat.config.value_checks import (
    above,
    at_least,
    fields_above,
    fields_at_least,
    finite,
    in_range,
    required,
    share,
    zero_stage,
)


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
    objective: PPOObjective
    run: PPORun

    @property
    def actor_lora(self) -> LoraOptions:
        """The actor's LoRA options."""
        return self.lora.actor

    @property
    def critic_lora(self) -> LoraOptions:
        """The critic's LoRA options."""
        return self.lora.critic

    @property
    def actor_system(self) -> SystemOptions:
        """The actor's system options."""
        return self.system.actor(self.lora.actor)

    @property
    def critic_system(self) -> SystemOptions:
        """The critic's system options."""
        return self.system.critic(self.lora.critic)

    @property
    def rollout_rows(self) -> int:
        """Responses per rank and rollout."""
        batch = self.batch
        return (
            batch.per_device_generation_batch_size
            * batch.generation_batches
            * batch.num_samples_per_prompt
        )

    @property
    def generation_rows(self) -> int:
        """Most responses per rank that are generated at a time, evaluation included."""
        batch = self.batch
        if self.system.generation_slots:
            most = max(self.rollout_rows, batch.per_device_eval_batch_size)
            return min(self.system.generation_slots, most)
        rows = batch.per_device_generation_batch_size * batch.num_samples_per_prompt
        return max(rows, batch.per_device_eval_batch_size)

    @property
    def rows_per_update(self) -> int:
        """Responses per rank and optimizer step."""
        return self.batch.per_device_training_batch_size * self.schedule.gradient_accumulation_steps

    @property
    def has_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return self.ppo.advantage_estimator == "gae"

    @property
    def has_reference(self) -> bool:
        """Whether a reference model is built and read, for the KL."""
        return self.ppo.kl_coef > 0

    @property
    def reward_models(self) -> list[str]:
        """Folders or hub ids of the reward models; empty if all rewards are functions."""
        if self.model.reward_model_name_or_path or self.model.reward_fn:
            return self.model.reward_model_name_or_path
        return [self.model.critic_model_name_or_path]

    @property
    def reward_flag(self) -> str:
        """The flag that names the reward models."""
        named = bool(self.model.reward_model_name_or_path)
        return "--reward_model_name_or_path" if named else "--critic_model_name_or_path"

    @property
    def reward_format(self) -> FrozenFormat:
        """Storage of the reward models' linear layers, which nothing trains."""
        if self.system.enable_mixed_precision_lora:
            return "int8"
        return self.system.quantize_frozen

    def reward_lora(self, path: str) -> LoraOptions:
        """Return the options that choose which layers of a reward model are quantized.

        They are the critic's for its own model, which it may replace, so that the scores stay the
        same. Other reward models have no adapters, and all layers are chosen.

        Args:
            path: of the reward model.
        """
        if path == self.model.critic_model_name_or_path and self.critic_lora.lora_dim > 0:
            return self.critic_lora
        return LoraOptions()

    @property
    def shares_reference(self) -> bool:
        """Whether the reference is the actor with its adapters off."""
        return self.has_reference and self.system.share_reference and self.actor_lora.keeps_start

    @property
    def shares_reward(self) -> bool:
        """Whether the critic with its adapters off, and another head, is also the reward model."""
        return (
            self.system.share_reward
            and self.has_critic
            and self.critic_lora.keeps_start
            and self.model.critic_model_name_or_path in self.reward_models
        )

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.rollout_rows // self.rows_per_update * self.batch.ppo_epochs

    def updates_left_out(self, role: str) -> int:
        """Return how many of the run's optimizer steps a model does not take.

        The actor takes none while the critic warms up.

        Args:
            role: "actor" or "critic".
        """
        if role == "actor" and self.has_critic:
            return self.ppo.critic_warmup_steps * self.updates_per_rollout
        return 0

    def num_rollouts(self, rollouts_per_epoch: int) -> int:
        """Return the number of rollouts of the run."""
        total = self.schedule.max_train_steps or rollouts_per_epoch * self.schedule.num_train_epochs
        if self.run.enable_test_mode and self.run.test_stop_step:
            return min(total, self.run.test_stop_step)
        return total

    def problems(self) -> list[str]:
        """Return everything that is wrong with these options, one sentence each."""
        found = self._model_problems()
        found += data_problems(self.data)
        found += schedule_problems(self.schedule)
        found += self._role_problems()
        found += self._batch_problems()
        found += self._system_problems()
        found += self._reward_problems()
        found += self._algorithm_problems()
        found += objective_problems(
            self.objective,
            self.ppo,
            num_samples=self.batch.num_samples_per_prompt,
            max_answer_tokens=self.data.max_answer_seq_len,
            hybrid_engine=self.system.enable_hybrid_engine,
        )
        found += self._sampling_problems()
        found += in_range("--ema_decay", self.model.ema_decay, 0.0, 1.0)
        found += at_least("--unsup_coef", self.data.unsup_coef, 0)
        return found + self._run_problems()

    def _model_problems(self) -> list[str]:
        model = self.model
        found = required("--actor_model_name_or_path", model.actor_model_name_or_path)
        has_other_reward = bool(model.reward_model_name_or_path or model.reward_fn)
        if self.has_critic or not has_other_reward:
            found += required("--critic_model_name_or_path", model.critic_model_name_or_path)
        return found + output_problems(self.run.output_dir, model.by_flag, below=MODEL_FOLDERS)

    def _role_problems(self) -> list[str]:
        """Check the options that the actor and the critic have one each of."""
        optim, system = self.optim, self.system
        found = zero_stage("--actor_zero_stage", system.actor_zero_stage)
        found += zero_stage("--critic_zero_stage", system.critic_zero_stage)

        found += lora_problems(self.actor_lora, prefix="--actor_")
        found += at_least("--actor_learning_rate", optim.actor_learning_rate, 0)
        found += at_least("--actor_weight_decay", optim.actor_weight_decay, 0)
        found += at_least("--actor_freeze_layers", system.actor_freeze_layers, 0)
        if system.actor_dropout is not None:
            found += in_range("--actor_dropout", system.actor_dropout, 0.0, 1.0)

        found += lora_problems(self.critic_lora, prefix="--critic_")
        found += at_least("--critic_learning_rate", optim.critic_learning_rate, 0)
        found += at_least("--critic_weight_decay", optim.critic_weight_decay, 0)
        found += at_least("--critic_freeze_layers", system.critic_freeze_layers, 0)
        if system.critic_dropout is not None:
            found += in_range("--critic_dropout", system.critic_dropout, 0.0, 1.0)

        has_adapters = self.lora.actor_lora_dim or self.lora.critic_lora_dim
        if self.lora.only_optimize_lora and not has_adapters:
            found.append(
                "--only_optimize_lora needs adapters: give --actor_lora_dim or --critic_lora_dim."
            )
        return found

    def _batch_problems(self) -> list[str]:
        sizes = (
            "per_device_generation_batch_size",
            "per_device_training_batch_size",
            "per_device_eval_batch_size",
            "generation_batches",
            "ppo_epochs",
            "num_samples_per_prompt",
        )
        found = fields_at_least(self.batch, sizes, 1)
        found += fields_at_least(self.data, ("max_prompt_seq_len", "max_answer_seq_len"), 1)
        for name in ("scoring_tokens_per_batch", "training_tokens_per_batch"):
            found += tokens_per_batch_problems(
                getattr(self.batch, name),
                least=self.data.max_prompt_seq_len + self.data.max_answer_seq_len,
                row="--max_prompt_seq_len and --max_answer_seq_len together",
                flag=f"--{name}",
            )
        if not found and self.rows_per_update > 0 and self.rollout_rows % self.rows_per_update:
            found.append(
                f"A rollout of {self.rollout_rows} rows per rank "
                "(--per_device_generation_batch_size x --generation_batches x "
                "--num_samples_per_prompt) is no multiple of an optimizer step of "
                f"{self.rows_per_update} rows (--per_device_training_batch_size x "
                "--gradient_accumulation_steps): change one of the five."
            )
        return found

    def _system_problems(self) -> list[str]:
        system = self.system
        found = fields_at_least(system, ("inference_tp_size", "tp_gather_partition_size"), 1)
        found += fields_at_least(system, ("generation_slots",), 0)
        if system.generation_slots > 0 and not system.enable_hybrid_engine:
            found.append(
                f"--generation_slots {system.generation_slots} needs --enable_hybrid_engine."
            )
        found += fields_at_least(system, ("generation_cache_gib",), 0)
        if 0 < system.generation_cache_gib < math.inf and system.generation_slots == 0:
            found.append(
                f"--generation_cache_gib {system.generation_cache_gib:g} needs --generation_slots."
            )
        if system.inference_tp_size > 1 and system.actor_zero_stage != 3:
            found.append(
                f"--inference_tp_size {system.inference_tp_size} needs --actor_zero_stage 3, "
                f"not {system.actor_zero_stage}."
            )
        found += frozen_format_problems(system, self.lora.actor_lora_dim, flag="--actor_lora_dim")
        return found

    def _reward_problems(self) -> list[str]:
        found = []
        model = self.model
        num_rewards = len(self.reward_models) + len(model.reward_fn)
        if model.reward_weights and len(model.reward_weights) != num_rewards:
            found.append(
                f"--reward_weights gives {len(model.reward_weights)} weights "
                f"for {num_rewards} rewards: one each."
            )
        for weight in model.reward_weights:
            found += finite("--reward_weights", weight)
        found += _duplicates("--reward_model_name_or_path", self.reward_models)
        found += _duplicates("--reward_fn", model.reward_fn)
        found += fields_at_least(model, ("reward_workers", "reward_timeout_s"), 0)
        if 0 < model.reward_timeout_s < math.inf and not model.reward_workers:
            found.append(
                f"--reward_timeout_s {model.reward_timeout_s:g} needs --reward_workers: only a "
                "function in another process can be stopped."
            )
        for name in model.reward_fn:
            file, _, function = name.rpartition(":")
            is_grader = re.fullmatch(GRADER, name, re.DOTALL)
            is_function = file.endswith(".py") or name == OBJECT_PREFIX + function
            if not is_grader and not (is_function and function.isidentifier()):
                found.append(
                    f"--reward_fn {name}: expected file.py:function, or a grader such as "
                    "numeric_match."
                )
        if not self.has_critic and self.batch.num_samples_per_prompt < 2:
            found.append(
                f"--advantage_estimator {self.ppo.advantage_estimator} compares answers to one "
                "prompt: give --num_samples_per_prompt 2 or more."
            )
        return found

    def _algorithm_problems(self) -> list[str]:
        ppo = self.ppo
        not_negative = (
            "kl_coef",
            "missing_eos_penalty",
            "entropy_coef",
            "router_aux_loss_coef",
            "critic_warmup_steps",
        )
        found = fields_at_least(ppo, not_negative, 0)
        found += fields_above(ppo, ("reward_clip", "cliprange", "cliprange_value", "kl_horizon"), 0)
        found += in_range("--gamma", ppo.gamma, 0.0, 1.0)
        found += in_range("--lam", ppo.lam, 0.0, 1.0)
        if ppo.kl_target is not None:
            found += above("--kl_target", ppo.kl_target, 0)
        if ppo.target_kl is not None:
            found += above("--target_kl", ppo.target_kl, 0)
        return found

    def _sampling_problems(self) -> list[str]:
        sampling = self.sampling
        found = above("--temperature", sampling.temperature, 0)
        found += share("--top_p", sampling.top_p, 1.0)
        found += at_least("--top_k", sampling.top_k, 0)
        num_samples = self.batch.num_samples_per_prompt
        if sampling.greedy_rollouts and num_samples > 1:
            found.append(
                f"--greedy_rollouts would give {num_samples} equal answers to each prompt: "
                "leave it out, or give --num_samples_per_prompt 1."
            )
        longest = self.data.max_answer_seq_len
        return found + in_range("--min_answer_len", sampling.min_answer_len, 0, longest)

    def _run_problems(self) -> list[str]:
        not_negative = ("eval_interval", "test_stop_step", "save_rollouts")
        found = fields_at_least(self.run, not_negative, 0)
        if self.run.save_rollouts > 0 and self.run.output_dir is None:
            found.append(f"--save_rollouts {self.run.save_rollouts} needs --output_dir.")
        found += at_least("--eval_prompts", self.run.eval_prompts, 2)
        return found + at_least("--print_answers_interval", self.run.print_answers_interval, 1)


def _duplicates(flag: str, names: list[str]) -> list[str]:
    """Return a problem for each name that is given more than once."""
    repeated = sorted(name for name in set(names) if names.count(name) > 1)
    return [f"{flag} {name} is given twice." for name in repeated]
