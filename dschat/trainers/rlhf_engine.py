"""The four models of step 3, each behind its DeepSpeed engine."""

import torch

from dschat.config.steps import PPOConfig
from dschat.config.options import SystemOptions
from dschat.engine.build import (
    TORCH_DTYPES,
    build_inference_engine,
    build_training_engine,
    on_cpu,
    override,
    partitioned_loading,
)
from dschat.engine.ds_config import inference_config, training_config
from dschat.engine.zero import scale_parameter
from dschat.models.causal_lm import disable_dropout, load_causal_lm
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import load_reward_model
from dschat.tracking import dist
from dschat.tracking.log import logger

LOADERS = {
    "actor": (load_causal_lm, "actor_model_name_or_path"),
    "ref": (load_causal_lm, "actor_model_name_or_path"),
    "critic": (load_reward_model, "critic_model_name_or_path"),
    "reward": (load_reward_model, "critic_model_name_or_path"),
}


class DeepSpeedRLHFEngine:
    """Actor, reference, reward and critic engines.

    Actor and reference start from the SFT model, critic and reward from the reward model. The critic comes last,
    by ``build_critic``, since its head is scaled by what the first three say of the rewards' spread.
    """

    def __init__(self, config: PPOConfig, *, tokenizer, critic_tokenizer, dtype: str, total_steps: int):
        """
        Args:
            dtype: "fp16", "bf16" or "fp32".
            total_steps: optimizer steps of the run, the schedules' length.
        """
        self._config, self._dtype, self._total_steps = config, dtype, total_steps
        self._tokenizers = {"actor": tokenizer, "ref": tokenizer, "critic": critic_tokenizer, "reward": critic_tokenizer}
        self.actor = self._training_engine("actor")
        self.ref = self._inference_engine("ref", offload=config.system.offload_reference_model)
        self.reward = self._inference_engine("reward", offload=config.system.offload_reward_model)
        self.critic = None

    def build_critic(self, *, score_std: float) -> None:
        """Build the critic, its values divided by `score_std`: exact, since the head has no bias."""
        self.critic = self._training_engine("critic", score_std=score_std)

    def eval(self) -> None:
        """Switch all engines to evaluation."""
        for engine in (self.actor, self.ref, self.critic, self.reward):
            if engine is not None:
                engine.eval()

    def train(self) -> None:
        """Switch the engines that learn to training (dropout stays off; checkpointing needs it)."""
        self.actor.train()
        self.critic.train()

    def _load(self, role: str, ds_config: dict) -> torch.nn.Module:
        load, field = LOADERS[role]
        with partitioned_loading(ds_config):
            model = load(
                getattr(self._config.model, field),
                dtype=TORCH_DTYPES[self._dtype],
                tokenizer=self._tokenizers[role],
                dropout=0.0,
                trust_remote_code=self._config.model.trust_remote_code,
                flag=f"--{field}",
            )
        disable_dropout(model)
        return model

    def _training_engine(self, role: str, *, score_std: float = 1.0):
        config = self._config
        system: SystemOptions = getattr(config, f"{role}_system")
        lora = getattr(config, f"{role}_lora")
        ds_config = training_config(
            system,
            dtype=self._dtype,
            micro_batch_size=config.batch.per_device_training_batch_size,
            gradient_accumulation_steps=config.schedule.gradient_accumulation_steps,
            world_size=dist.world_size(),
            on_cpu=on_cpu(),
            tensorboard_path=config.run.tensorboard_path if config.run.enable_tensorboard else None,
            tensorboard_name=f"step3_{role}",
        )
        ds_config = override(ds_config, config.run.deepspeed_config or config.run.deepscale_config)
        logger.info(f"loading the {role}")
        model = self._load(role, ds_config)
        if role == "critic":
            scale_parameter(model.model.score.weight, 1.0 / score_std)
        lora_names = prepare_for_training(model, lora=lora, system=system, role=role)
        disable_dropout(model)
        return build_training_engine(
            model,
            ds_config=ds_config,
            schedule=config.schedule,
            total_steps=self._total_steps,
            learning_rate=getattr(config.optim, f"{role}_learning_rate"),
            weight_decay=getattr(config.optim, f"{role}_weight_decay"),
            lora_names=lora_names,
            lora_learning_rate=lora.lora_learning_rate,
        )

    def _inference_engine(self, role: str, *, offload: bool):
        config = self._config
        stage = config.system.actor_zero_stage if role == "ref" else config.system.critic_zero_stage
        ds_config = inference_config(
            SystemOptions(zero_stage=stage, offload=offload),
            dtype=self._dtype,
            micro_batch_size=config.batch.per_device_training_batch_size,
            world_size=dist.world_size(),
        )
        logger.info(f"loading the {role} model")
        return build_inference_engine(self._load(role, ds_config), ds_config=ds_config)
