"""The four models of step 3, each inside its DeepSpeed engine."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from dschat.config.options import LoraOptions, SystemOptions
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
from dschat.models.lora import adapted_layer_names, log_lora
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import load_reward_model
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.trainers.frozen_models import rounded


class ModelSource(NamedTuple):
    """A model to load, and the function that loads it."""

    load: Callable[..., torch.nn.Module]
    path: str
    flag: str  # the flag that names `path`, for messages
    tokenizer: object


@dataclass(frozen=True)
class TrainingOptions:
    """The options of a model that is trained."""

    role: str  # "actor" or "critic"
    system: SystemOptions
    lora: LoraOptions
    learning_rate: float
    weight_decay: float


class DeepSpeedRLHFEngine:
    """Actor, reference, reward and critic engines.

    Actor and reference start from the SFT model. The critic starts from
    --critic_model_name_or_path, which is also the reward model unless others are named. The critic
    is built last, by ``build_critic``: its head is scaled by the spread of the rewards, which the
    other models give. Critic-free estimators build none. --kl_coef 0 builds no reference.
    """

    def __init__(self, config: PPOConfig, *, tokenizer, dtype: str, total_steps: int):
        """Load actor and reference, and build the generator.

        Args:
            config: of the run.
            tokenizer: the actor's.
            dtype: "fp16", "bf16" or "fp32".
            total_steps: updates of the run. A learning-rate schedule has as many steps, less the
                updates that its model does not take part in.
        """
        self._config = config
        self.dtype = dtype
        self._total_steps = total_steps
        path = config.model.actor_model_name_or_path
        source = ModelSource(load_causal_lm, path, "--actor_model_name_or_path", tokenizer)
        self.actor = self._build_actor(source)
        self.ref = None
        if not config.has_reference:
            self._say_what_no_reference_saves()
        elif config.shares_reference:
            self.ref = AdaptersOff(self.actor)
        else:
            self.ref = self._build_reference(source)
        self.rewards: list = []
        self.critic = None
        # The reward engine that the critic with its adapters off will replace.
        self._shared_reward: Replaceable | None = None
        self._offloaded: list = []  # engines whose idle states are in host memory
        if config.system.offload_idle_states and on_cpu():
            logger.info("--offload_idle_states has no effect on a CPU")
        # Last, since the Hybrid Engine measures the memory that is left.
        self.generator = self._build_generator()

    def add_reward(self, path: str, *, flag: str, tokenizer):
        """Load a reward model inside an engine, and return the engine."""
        config = self._config
        system = config.system
        load = rounded(
            partial(load_reward_model, fresh_head=False),
            config.reward_format,
            config.reward_lora(path),
            prefix="--critic_",
        )
        engine = self._build_inference_engine(
            ModelSource(load, path, flag, tokenizer),
            stage=system.critic_zero_stage,
            offload=system.offload_reward_model,
        )
        if config.shares_reward and path == config.model.critic_model_name_or_path:
            engine = Replaceable(engine)
            self._shared_reward = engine
        self.rewards.append(engine)
        return engine

    def build_critic(self, *, tokenizer, score_std: float) -> None:
        """Build the critic, with values divided by `score_std`.

        The division scales the weights of the head, which is exact since it has no bias.
        """
        path = self._config.model.critic_model_name_or_path
        source = ModelSource(load_reward_model, path, "--critic_model_name_or_path", tokenizer)
        if self._shared_reward is not None:
            logger.info(
                "the reward model is discarded: from now on it is the critic with its adapters "
                "off, with a separate head"
            )
            self._shared_reward.discard()
        self.critic = self._build_critic(source, score_std=score_std)
        if self._shared_reward is not None:
            self._shared_reward.engine = AdaptersOff(self.critic)

    @property
    def trained(self) -> list:
        """The engines that are trained."""
        return [engine for engine in (self.actor, self.critic) if engine is not None]

    @property
    def frozen(self) -> list:
        """The engines that are not trained: the reference, if there is one, and the rewards."""
        return [engine for engine in (self.ref, *self.rewards) if engine is not None]

    def eval(self) -> None:
        """Switch all engines to evaluation.

        With --offload_idle_states, move to host memory what only updates need.
        """
        if self._config.system.offload_idle_states and not on_cpu():
            for engine in self.trained:
                if engine not in self._offloaded:
                    offload_idle_states(engine, pin_memory=self._config.system.pin_memory)
                    self._offloaded.append(engine)
        for engine in (*self.trained, *self.frozen):
            engine.eval()

    def train(self) -> None:
        """Switch the trained engines to training mode, which gradient checkpointing needs.

        Dropout stays off.
        """
        while self._offloaded:
            reload_idle_states(self._offloaded.pop())
        for engine in self.trained:
            engine.train()

    def _build_generator(self) -> Generator:
        config = self._config
        system = config.system
        if not system.enable_hybrid_engine:
            return PlainGenerator(self.actor)
        data = config.data
        rows = config.generation_rows
        return HybridEngine(
            self.actor,
            lora_mode=system.hybrid_lora,
            cuda_graph=system.cuda_graph,
            compiled=system.compile,
            unpin=system.unpin_actor_parameters,
            release_cache=system.release_inference_cache,
            max_rows=rows,
            slots=rows if system.generation_slots else 0,
            cache_gib=system.generation_cache_gib,
            max_length=data.max_prompt_seq_len + data.max_answer_seq_len,
            group=tensor_group(system.inference_tp_size),
            gather_layers=system.tp_gather_partition_size if system.inference_tp_size > 1 else 1,
        )

    def _load(self, source: ModelSource, ds_config: dict) -> torch.nn.Module:
        logger.info(f"loading {source.path} ({source.flag})")
        with partitioned_loading(ds_config):
            model = source.load(
                source.path,
                dtype=TORCH_DTYPES[self.dtype],
                tokenizer=source.tokenizer,
                dropout=0.0,
                trust_remote_code=self._config.model.trust_remote_code,
                flag=source.flag,
            )
        disable_dropout(model)
        return model

    def _build_actor(self, source: ModelSource):
        config = self._config
        options = TrainingOptions(
            role="actor",
            system=config.actor_system,
            lora=config.actor_lora,
            learning_rate=config.optim.actor_learning_rate,
            weight_decay=config.optim.actor_weight_decay,
        )
        ds_config = self._training_config(options)
        return self._build_training_engine(options, ds_config, self._load(source, ds_config))

    def _build_critic(self, source: ModelSource, *, score_std: float):
        config = self._config
        options = TrainingOptions(
            role="critic",
            system=config.critic_system,
            lora=config.critic_lora,
            learning_rate=config.optim.critic_learning_rate,
            weight_decay=config.optim.critic_weight_decay,
        )
        ds_config = self._training_config(options)
        model = self._load(source, ds_config)
        head = model.model.score.weight
        if self._shared_reward is not None:
            with gathered([head]):
                model.keep_reward_head(head)
        scale_parameter(head, 1.0 / score_std)
        return self._build_training_engine(options, ds_config, model)

    def _training_config(self, options: TrainingOptions) -> dict:
        config = self._config
        rows, steps = config.batch.layout(config.schedule.gradient_accumulation_steps)
        ds_config = training_config(
            options.system,
            dtype=self.dtype,
            micro_batch_size=rows,
            gradient_accumulation_steps=steps,
            world_size=dist.world_size(),
            on_cpu=on_cpu(),
            tensorboard_path=config.run.tensorboard_path if config.run.enable_tensorboard else None,
            tensorboard_name=f"step3_{options.role}",
            ranks_per_node=dist.ranks_per_node(),
        )
        return override(ds_config, *config.run.deepspeed_file)

    def _build_training_engine(
        self, options: TrainingOptions, ds_config: dict, model: torch.nn.Module
    ):
        config = self._config
        system = options.system
        lora_names = prepare_for_training(
            model, lora=options.lora, system=system, role=options.role
        )
        log_lora(model, chosen=options.lora.chooses_layers, prefix=f"--{options.role}_")
        if system.frozen_format != "none":
            quantize_linears(model, adapted_layer_names(model), system.frozen_format)
        return build_training_engine(
            model,
            ds_config=ds_config,
            schedule=config.schedule,
            total_steps=max(self._total_steps - config.updates_left_out(options.role), 1),
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            lora_names=lora_names,
            lora_learning_rate=options.lora.lora_learning_rate,
            compile_layers=system.compile_layers
            and system.frozen_format == "none"
            and not (options.role == "actor" and config.ppo.router_aux_loss_coef),
        )

    def _say_what_no_reference_saves(self) -> None:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.actor.module.parameters())
        size = parameters * TORCH_DTYPES[self.dtype].itemsize / 2**30
        logger.info(
            f"--kl_coef 0: no reference model is built. That saves {size:.2f} GiB of weights "
            "(divided by the ranks under ZeRO-3) and a forward of each rollout. The KL is not "
            "measured; to measure it, give --kl_coef 1e-9."
        )

    def _build_reference(self, source: ModelSource):
        config = self._config
        system = config.system
        kind = config.actor_system.frozen_format
        load = rounded(load_causal_lm, kind, config.actor_lora, prefix="--actor_")
        return self._build_inference_engine(
            source._replace(load=load),
            stage=system.actor_zero_stage,
            offload=system.offload_reference_model,
        )

    def _build_inference_engine(self, source: ModelSource, *, stage: int, offload: bool):
        config = self._config
        ds_config = inference_config(
            SystemOptions(zero_stage=stage, offload=offload, pin_memory=config.system.pin_memory),
            dtype=self.dtype,
            micro_batch_size=config.batch.per_device_training_batch_size,
            world_size=dist.world_size(),
        )
        return build_inference_engine(self._load(source, ds_config), ds_config=ds_config)
