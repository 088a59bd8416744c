"""One frozen dataclass a step: its option groups, the checks across them, and the sizes that follow from them.

That of DPO is in dpo.py.
"""

from dataclasses import dataclass

from dschat.config.group_checks import (
    data_problems,
    lora_problems,
    output_problems,
    schedule_problems,
)
from dschat.config.options import (
    LoraOptions,
    SystemOptions,
)
from dschat.config.ppo_options import (
    MODEL_FOLDERS,
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
    lora_twin,
    system_twin,
)
from dschat.config.value_checks import (
    above,
    at_least,
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
    run: PPORun

    @property
    def actor_lora(self) -> LoraOptions:
        return lora_twin(self.lora, "actor")

    @property
    def critic_lora(self) -> LoraOptions:
        return lora_twin(self.lora, "critic")

    @property
    def actor_system(self) -> SystemOptions:
        return system_twin(self.system, self.actor_lora, "actor")

    @property
    def critic_system(self) -> SystemOptions:
        return system_twin(self.system, self.critic_lora, "critic")

    @property
    def rollout_rows(self) -> int:
        """Answers per process and rollout."""
        batch = self.batch
        return (
            batch.per_device_generation_batch_size
            * batch.generation_batches
            * batch.num_samples_per_prompt
        )

    @property
    def has_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return self.ppo.advantage_estimator == "gae"

    @property
    def reward_models(self) -> list[str]:
        """Folders or hub ids of the reward models; empty where functions alone reward."""
        if self.model.reward_model_name_or_path or self.model.reward_fn:
            return self.model.reward_model_name_or_path
        return [self.model.critic_model_name_or_path]

    @property
    def shares_reference(self) -> bool:
        """Whether the reference is the actor with its adapters off."""
        return self.system.share_reference and self.actor_lora.only_optimize_lora

    @property
    def shares_reward(self) -> bool:
        """Whether the critic, with its adapters off and another head, is also the reward model it starts from."""
        is_reward = self.model.critic_model_name_or_path in self.reward_models
        return (
            self.system.share_reward
            and self.has_critic
            and self.critic_lora.only_optimize_lora
            and is_reward
        )

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        window = (
            self.batch.per_device_training_batch_size * self.schedule.gradient_accumulation_steps
        )
        return self.rollout_rows // window * self.batch.ppo_epochs

    def updates_left_out(self, role: str) -> int:
        """Optimizer steps of the run that a model sits out: the actor while the critic warms up."""
        return (
            self.ppo.critic_warmup_steps * self.updates_per_rollout
            if role == "actor" and self.has_critic
            else 0
        )

    def num_rollouts(self, rollouts_per_epoch: int) -> int:
        """Rollouts of the run."""
        total = self.schedule.max_train_steps or rollouts_per_epoch * self.schedule.num_train_epochs
        return (
            min(total, self.run.test_stop_step)
            if self.run.enable_test_mode and self.run.test_stop_step
            else total
        )

    def problems(self) -> list[str]:
        """Everything that is wrong with these options, one sentence each."""
        found = required("--actor_model_name_or_path", self.model.actor_model_name_or_path)
        if self.has_critic or not (self.model.reward_model_name_or_path or self.model.reward_fn):
            found += required("--critic_model_name_or_path", self.model.critic_model_name_or_path)
        found += output_problems(self.run.output_dir, self.model.by_flag, below=MODEL_FOLDERS)
        found += data_problems(self.data) + schedule_problems(self.schedule)
        for name in ("actor_zero_stage", "critic_zero_stage"):
            found += zero_stage("--" + name, getattr(self.system, name))
        for role in ("actor", "critic"):
            found += lora_problems(getattr(self, f"{role}_lora"), prefix=f"--{role}_")
            for name in (f"{role}_learning_rate", f"{role}_weight_decay"):
                found += at_least("--" + name, getattr(self.optim, name), 0)
            found += at_least(
                f"--{role}_freeze_layers", getattr(self.system, f"{role}_freeze_layers"), 0
            )
            dropout = getattr(self.system, f"{role}_dropout")
            found += [] if dropout is None else in_range(f"--{role}_dropout", dropout, 0.0, 1.0)
        if self.lora.only_optimize_lora and not (
            self.lora.actor_lora_dim or self.lora.critic_lora_dim
        ):
            found.append(
                "--only_optimize_lora needs adapters: give --actor_lora_dim or --critic_lora_dim."
            )
        return found + self._batch_problems() + self._system_problems() + self._algorithm_problems()

    def _batch_problems(self) -> list[str]:
        found = []
        for name in (
            "per_device_generation_batch_size",
            "per_device_training_batch_size",
            "per_device_eval_batch_size",
            "generation_batches",
            "ppo_epochs",
            "num_samples_per_prompt",
        ):
            found += at_least("--" + name, getattr(self.batch, name), 1)
        for name in ("max_prompt_seq_len", "max_answer_seq_len"):
            found += at_least("--" + name, getattr(self.data, name), 1)
        window = (
            self.batch.per_device_training_batch_size * self.schedule.gradient_accumulation_steps
        )
        if not found and self.rollout_rows % window:
            found.append(
                f"A rollout of {self.rollout_rows} rows per process (--per_device_generation_batch_size x "
                f"--generation_batches x --num_samples_per_prompt) is no multiple of an optimizer step of {window} rows "
                "(--per_device_training_batch_size x --gradient_accumulation_steps): change one of the five."
            )
        return found

    def _system_problems(self) -> list[str]:
        found = []
        system = self.system
        for name in ("inference_tp_size", "tp_gather_partition_size"):
            found += at_least("--" + name, getattr(system, name), 1)
        if system.inference_tp_size > 1 and system.actor_zero_stage != 3:
            found.append(
                f"--inference_tp_size {system.inference_tp_size} needs --actor_zero_stage 3, "
                f"not {system.actor_zero_stage}."
            )
        if system.enable_mixed_precision_lora and not self.lora.actor_lora_dim:
            found.append(
                "--enable_mixed_precision_lora keeps the weights that LoRA adapts in int8: give --actor_lora_dim above 0."
            )
        return found

    def _reward_problems(self) -> list[str]:
        found, model = [], self.model
        num_rewards = len(self.reward_models) + len(model.reward_fn)
        if model.reward_weights and len(model.reward_weights) != num_rewards:
            found.append(
                f"--reward_weights gives {len(model.reward_weights)} weights for {num_rewards} rewards: one each."
            )
        for weight in model.reward_weights:
            found += finite("--reward_weights", weight)
        for names, flag in (
            (self.reward_models, "--reward_model_name_or_path"),
            (model.reward_fn, "--reward_fn"),
        ):
            found += [
                f"{flag} {name} is given twice."
                for name in sorted(set(names))
                if names.count(name) > 1
            ]
        for name in model.reward_fn:
            file, _, function = name.rpartition(":")
            if not (file.endswith(".py") and function.isidentifier()):
                found.append(f"--reward_fn {name}: expected file.py:function.")
        if not self.has_critic and self.batch.num_samples_per_prompt < 2:
            found.append(
                f"--advantage_estimator {self.ppo.advantage_estimator} compares answers to one prompt: give "
                "--num_samples_per_prompt 2 or more."
            )
        return found

    def _algorithm_problems(self) -> list[str]:
        ppo, sampling, found = self.ppo, self.sampling, self._reward_problems()
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
        found += share("--top_p", sampling.top_p, 1.0)
        found += at_least("--top_k", sampling.top_k, 0)
        if sampling.greedy_rollouts and self.batch.num_samples_per_prompt > 1:
            found.append(
                f"--greedy_rollouts would give {self.batch.num_samples_per_prompt} equal answers to each prompt: leave it "
                "out, or give --num_samples_per_prompt 1."
            )
        found += in_range(
            "--min_answer_len", sampling.min_answer_len, 0, self.data.max_answer_seq_len
        )
        found += in_range("--ema_decay", self.model.ema_decay, 0.0, 1.0)
        found += at_least("--unsup_coef", self.data.unsup_coef, 0)
        found += at_least("--eval_interval", self.run.eval_interval, 0)
        found += at_least("--test_stop_step", self.run.test_stop_step, 0)
        found += at_least("--eval_prompts", self.run.eval_prompts, 2)
        found += at_least("--print_answers_interval", self.run.print_answers_interval, 1)
        return found
