"""The four models of step 3, each inside its DeepSpeed engine."""

from functools import partial

import torch

from dschat.config.options import SystemOptions
from dschat.config.ppo import PPOConfig
from dschat.engine.build import (
    build_inference_engine,
    build_training_engine,
    override,
    partitioned_loading,
)
from dschat.engine.device import TORCH_DTYPES, on_cpu
from dschat.engine.ds_config import inference_config, training_config
from dschat.engine.hybrid_engine import Generator, HybridEngine, PlainGenerator
from dschat.engine.offload import offload_idle_states, reload_idle_states
from dschat.engine.quantized import quantize_linears
from dschat.engine.shared_models import AdaptersOff, Replaceable
from dschat.engine.zero import gathered, scale_parameter
from dschat.generation.tensor_parallel import tensor_group
from dschat.models.causal_lm import load_causal_lm
from dschat.models.dropout import disable_dropout
from dschat.models.lora import adapted_layer_names
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import load_reward_model
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.trainers.reference_model import reference_loader


class DeepSpeedRLHFEngine:
    """Actor, reference, reward and critic engines.

    Actor and reference start from the SFT model; the critic from --critic_model_name_or_path, which is also the
    reward unless others are named. The critic comes last, by ``build_critic``, since its head is scaled by what the
    first three say of the rewards' spread; critic-free estimators build none.
    """

    def __init__(self, config: PPOConfig, *, tokenizer, dtype: str, total_steps: int):
        """
        Args:
            tokenizer: the actor's.
            dtype: "fp16", "bf16" or "fp32".
            total_steps: optimizer steps of the run; the schedules' length, less what a model sits out.
        """
        self._config, self._dtype, self._total_steps = config, dtype, total_steps
        path = config.model.actor_model_name_or_path
        source = (load_causal_lm, path, "--actor_model_name_or_path", tokenizer)
        self.actor = self._training_engine("actor", source)
        self.ref = (
            AdaptersOff(self.actor) if config.shares_reference else self._reference_engine(source)
        )
        self.rewards: list = []
        self.critic = None
        self._to_be_shared: Replaceable | None = (
            None  # the reward engine that the critic will stand in for
        )
        self._without_states: list = []  # engines whose idle states are in host memory
        if config.system.offload_idle_states and on_cpu():
            logger.info("--offload_idle_states has no effect on a CPU")
        # Last, since the Hybrid Engine looks at the memory that is left.
        self.generator = self._generator()

    def add_reward(self, path: str, *, flag: str, tokenizer):
        """Load a reward model inside an engine, and return the engine."""
        system = self._config.system
        engine = self._inference_engine(
            (partial(load_reward_model, fresh_head=False), path, flag, tokenizer),
            stage=system.critic_zero_stage,
            offload=system.offload_reward_model,
        )
        if self._config.shares_reward and path == self._config.model.critic_model_name_or_path:
            engine = self._to_be_shared = Replaceable(engine)
        self.rewards.append(engine)
        return engine

    def build_critic(self, *, tokenizer, score_std: float) -> None:
        """Build the critic, its values divided by `score_std`: exact, since the head has no bias."""
        path = self._config.model.critic_model_name_or_path
        source = (load_reward_model, path, "--critic_model_name_or_path", tokenizer)
        if self._to_be_shared is not None:
            logger.info(
                "the reward model is loaded again, as the critic with its adapters off and a head of its own"
            )
            self._to_be_shared.discard()
        self.critic = self._training_engine("critic", source, score_std=score_std)
        if self._to_be_shared is not None:
            self._to_be_shared.engine = AdaptersOff(self.critic)

    @property
    def trained(self) -> list:
        """The engines that learn."""
        return [engine for engine in (self.actor, self.critic) if engine is not None]

    def eval(self) -> None:
        """Switch all engines to evaluation; with --offload_idle_states, what only updates need leaves the device."""
        if self._config.system.offload_idle_states and not on_cpu():
            for engine in [engine for engine in self.trained if engine not in self._without_states]:
                offload_idle_states(engine, pin_memory=self._config.system.pin_memory)
                self._without_states.append(engine)
        for engine in (*self.trained, self.ref, *self.rewards):
            engine.eval()

    def train(self) -> None:
        """Switch the engines that learn to training (dropout stays off; checkpointing needs it)."""
        while self._without_states:
            reload_idle_states(self._without_states.pop())
        for engine in self.trained:
            engine.train()

    def _generator(self) -> Generator:
        config, system = self._config, self._config.system
        if not system.enable_hybrid_engine:
            return PlainGenerator(self.actor)
        batch, data = config.batch, config.data
        rollout_rows = batch.per_device_generation_batch_size * batch.num_samples_per_prompt
        return HybridEngine(
            self.actor,
            lora_mode=system.hybrid_lora,
            cuda_graph=system.cuda_graph,
            compiled=system.compile,
            unpin=system.unpin_actor_parameters,
            release_cache=system.release_inference_cache,
            max_rows=max(rollout_rows, batch.per_device_eval_batch_size),
            max_length=data.max_prompt_seq_len + data.max_answer_seq_len,
            group=tensor_group(system.inference_tp_size),
            gather_layers=system.tp_gather_partition_size if system.inference_tp_size > 1 else 1,
        )

    def _load(self, source: tuple, ds_config: dict) -> torch.nn.Module:
        load, path, flag, tokenizer = source
        logger.info(f"loading {path} ({flag})")
        with partitioned_loading(ds_config):
            model = load(
                path,
                dtype=TORCH_DTYPES[self._dtype],
                tokenizer=tokenizer,
                dropout=0.0,
                trust_remote_code=self._config.model.trust_remote_code,
                flag=flag,
            )
        disable_dropout(model)
        return model

    def _training_engine(self, role: str, source: tuple, *, score_std: float = 1.0):
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
            ranks_per_node=dist.ranks_per_node(),
        )
        ds_config = override(ds_config, config.run.deepspeed_config or config.run.deepscale_config)
        model = self._load(source, ds_config)
        if role == "critic":
            if self._to_be_shared is not None:
                with gathered([model.model.score.weight]):
                    model.keep_reward_head(model.model.score.weight)
            scale_parameter(model.model.score.weight, 1.0 / score_std)
        lora_names = prepare_for_training(model, lora=lora, system=system, role=role)
        if system.enable_mixed_precision_lora:
            quantize_linears(model, adapted_layer_names(model))
        return build_training_engine(
            model,
            ds_config=ds_config,
            schedule=config.schedule,
            total_steps=max(self._total_steps - config.updates_left_out(role), 1),
            learning_rate=getattr(config.optim, f"{role}_learning_rate"),
            weight_decay=getattr(config.optim, f"{role}_weight_decay"),
            lora_names=lora_names,
            lora_learning_rate=lora.lora_learning_rate,
            compile_layers=system.compile_layers and not system.enable_mixed_precision_lora,
        )

    def _reference_engine(self, source: tuple):
        system, lora = self._config.system, self._config.actor_lora

        load = reference_loader(self._config.actor_system, lora, flag="--actor_lora_module_name")
        return self._inference_engine(
            (load, *source[1:]),
            stage=system.actor_zero_stage,
            offload=system.offload_reference_model,
        )

    def _inference_engine(self, source: tuple, *, stage: int, offload: bool):
        config = self._config
        ds_config = inference_config(
            SystemOptions(zero_stage=stage, offload=offload, pin_memory=config.system.pin_memory),
            dtype=self._dtype,
            micro_batch_size=config.batch.per_device_training_batch_size,
            world_size=dist.world_size(),
        )
        return build_inference_engine(self._load(source, ds_config), ds_config=ds_config)
