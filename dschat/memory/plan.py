"""The memory of a whole step, phase by phase."""

from dataclasses import dataclass, replace
from typing import Any

from dschat.config.dpo import DPOConfig
from dschat.config.options import SystemOptions
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.memory.activations import (
    inference_bytes,
    kept_bytes,
    kl_bytes,
    loss_bytes,
    packed_mask_bytes,
)
from dschat.memory.footprint import WIDTHS, Footprint, inference_footprint, training_footprint
from dschat.memory.model_size import ModelSize, named_size
from dschat.memory.phases import (
    Parts,
    drop_idle_states,
    largest_part,
    optimizer_step_parts,
    resident_parts,
    sum_parts,
    training_phases,
)


@dataclass(frozen=True)
class StepPlan:
    """The bytes that one rank needs on its GPU and on its host.

    Attributes:
        models: footprint of each model.
        sizes: size of each model.
        resident: what stays from phase to phase in addition to the models.
        parts: by phase, everything that is on the GPU at its worst moment.
    """

    models: dict[str, Footprint]
    sizes: dict[str, ModelSize]
    resident: dict[str, float]
    parts: dict[str, Parts]

    @property
    def phases(self) -> dict[str, float]:
        """The bytes of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.parts.items()}

    @property
    def peak(self) -> tuple[str, float]:
        """The worst phase and its bytes."""
        return max(self.phases.items(), key=lambda item: item[1])

    def host_parts(self, *, processes: int) -> Parts:
        """Return the bytes that a host must hold: permanent ones, or a model while it is read.

        Args:
            processes: ranks of the host.
        """
        weights = processes * sum(model.host_weights for model in self.models.values())
        stays = processes * sum(model.host for model in self.models.values())
        reads = max(
            model.whole * (1 if model.read_once else processes) for model in self.models.values()
        )
        return largest_part({"weights": weights, "optimizer": stays - weights}, {"weights": reads})

    def host_bytes(self, *, processes: int) -> float:
        """Return the sum of ``host_parts``."""
        return sum(self.host_parts(processes=processes).values())


def plan_step(config, *, world_size: int, dtype: str) -> StepPlan:
    """Return the plan of a checked configuration of any step.

    Args:
        config: of the step.
        world_size: ranks, one GPU each.
        dtype: "fp16", "bf16" or "fp32".

    Raises:
        ValueError: a model is not known, or options do not fit it.
    """
    if isinstance(config, PPOConfig):
        return _plan_ppo(config, world_size=world_size, dtype=dtype)
    return _plan_supervised(config, world_size=world_size, dtype=dtype)


def _plan_supervised(config, *, world_size: int, dtype: str) -> StepPlan:
    width = WIDTHS[dtype]
    system = config.system
    batch = config.batch
    options = dict(flag="--model_name_or_path", trust_remote_code=config.model.trust_remote_code)
    name = config.model.model_name_or_path
    reward = isinstance(config, RewardConfig)
    size = named_size(name, reward=reward, lora=config.lora, system=system, **options)
    _, steps = batch.layout(config.schedule.gradient_accumulation_steps)
    model = training_footprint(size, system, dtype=dtype, world_size=world_size, accumulation=steps)
    sizes = {"model": size}
    models = {"model": model}
    if isinstance(config, DPOConfig) and not config.shares_reference:
        sizes["reference"] = named_size(
            name, lora=config.lora, stored=system.frozen_format, **options
        )
        models["reference"] = inference_footprint(
            sizes["reference"],
            stage=system.zero_stage,
            offload=system.offload_reference_model,
            width=width,
            world_size=world_size,
            pin_memory=system.pin_memory,
        )
    beside = sum_parts(*(resident_parts(other) for key, other in models.items() if key != "model"))
    rows = 1 if isinstance(config, SFTConfig) else 2  # a pair has two texts
    length = config.data.max_seq_len
    train = rows * batch.per_device_train_batch_size * length
    if batch.tokens_per_batch:
        train = min(batch.tokens_per_batch, train * config.schedule.gradient_accumulation_steps)
    evaluate = rows * batch.per_device_eval_batch_size * length
    evaluation = max(
        inference_bytes(size, tokens=evaluate, width=width),
        loss_bytes(evaluate * size.vocab, width=width, sliced=False, backward=False),
    )
    there = sum_parts(beside, resident_parts(model))
    masks = 0.0
    if batch.packing:
        masks = packed_mask_bytes(
            size,
            rows=batch.per_device_train_batch_size,
            length=rows * length,
            width=width,
            checkpointing=system.gradient_checkpointing,
        )
    parts = {
        "build": sum_parts(beside, {"weights": model.weights, "copies": model.build}),
        **training_phases(
            "",
            size,
            model,
            system,
            tokens=train,
            logits=train * size.vocab,
            width=width,
            there=there,
            masks=masks,
        ),
        "evaluate": sum_parts(there, {"activations": evaluation}),
    }
    return StepPlan(models, sizes, {}, parts)


def _plan_ppo(config: PPOConfig, *, world_size: int, dtype: str) -> StepPlan:
    width = WIDTHS[dtype]
    sizes, models = _ppo_models(config, world_size=world_size, dtype=dtype)
    batch = config.batch
    data = config.data
    system = config.system
    prompt = data.max_prompt_seq_len
    answer = data.max_answer_seq_len
    actor = sizes["actor"]
    rows = batch.per_device_generation_batch_size * batch.num_samples_per_prompt
    held = rows_of_evaluation(config, world_size=world_size)
    decoded = config.generation_rows if system.generation_slots else max(rows, held)
    resident, passing = _for_generation(config, actor, rows=decoded, width=width)
    there = sum_parts(resident, *map(resident_parts, models.values()))
    idle = list(models.values())
    if system.offload_idle_states:
        idle = [drop_idle_states(model) for model in idle]
    waiting = sum_parts(resident, *map(resident_parts, idle))

    tokens, positions = _training_tokens(config)
    logits = positions * actor.vocab
    group = _group_size(config)
    prompts = inference_bytes(actor, tokens=group * decoded * prompt, width=width, split=group)
    exact_kl = 0.0
    if config.has_reference:
        exact_kl = kl_bytes(held * (answer + 1) * actor.vocab, width=width)
    critic = models.get("critic")
    parts = {
        "build": sum_parts(
            *({"weights": model.weights} for model in models.values()),
            {"copies": max(model.build for model in models.values())},
        ),
        "generate": sum_parts(
            waiting,
            passing,
            largest_part(
                {"activations": prompts},
                {"buffers": _whole_layers_bytes(config, actor, width=width)},
            ),
        ),
        "score": sum_parts(
            waiting, {"activations": _scoring_bytes(config, sizes, rows=rows, width=width)}
        ),
        "evaluate": sum_parts(
            waiting,
            {
                "activations": exact_kl
                + inference_bytes(actor, tokens=held * (prompt + answer), width=width)
            },
        ),
        **training_phases(
            "actor ",
            actor,
            models["actor"],
            config.actor_system,
            tokens=tokens,
            logits=logits,
            width=width,
            sliced=True,
            there=sum_parts(there, {"gradients": critic.waiting if critic else 0.0}),
        ),
    }
    if critic:
        parts |= _critic_phases(
            config, sizes["critic"], models, tokens=tokens, width=width, there=there
        )
    if data.unsupervised_dataset_name:
        texts = batch.per_device_training_batch_size * (prompt + answer)
        ptx = _ptx_parts(config, actor, models["actor"], tokens=texts, width=width)
        parts["actor PTX"] = sum_parts(there, ptx)
    return StepPlan(
        models,
        sizes,
        {**resident, **{f"{k} (while generating)": v for k, v in passing.items()}},
        parts,
    )


def _training_tokens(config: PPOConfig) -> tuple[int, int]:
    """Return the tokens of an update's largest micro-batch, and its positions with logits."""
    data = config.data
    length = data.max_prompt_seq_len + data.max_answer_seq_len
    most = config.batch.training_tokens_per_batch
    if most:
        tokens = min(most, config.rows_per_update * length)
        return tokens, tokens  # the shortest prompt may be a single token
    rows = config.batch.per_device_training_batch_size
    return rows * length, rows * (data.max_answer_seq_len + 1)


def _scoring_bytes(
    config: PPOConfig, sizes: dict[str, ModelSize], *, rows: int, width: int
) -> float:
    """Return the activations of scoring a generation batch of `rows` answers."""
    answer = config.data.max_answer_seq_len
    tokens = rows * (config.data.max_prompt_seq_len + answer)
    positions = rows * (answer + 1)
    if config.batch.scoring_tokens_per_batch:
        # The shortest prompt of a part may be a single token.
        tokens = positions = min(tokens, config.batch.scoring_tokens_per_batch)
    elements = positions * sizes["actor"].vocab
    logits = loss_bytes(elements, width=width, sliced=True, backward=False)
    forwards = (inference_bytes(size, tokens=tokens, width=width) for size in sizes.values())
    return max(logits, *forwards)


def _ptx_parts(
    config: PPOConfig, size: ModelSize, actor: Footprint, *, tokens: int, width: int
) -> Parts:
    """Return what the actor's backward of the unsupervised (PTX) loss needs."""
    checkpointing = config.actor_system.gradient_checkpointing
    kept = kept_bytes(size, tokens=tokens, width=width, checkpointing=checkpointing)
    loss = loss_bytes(tokens * size.vocab, width=width, sliced=False, backward=True)
    return {"gradients": actor.gradients + actor.waiting, "activations": kept + loss}


def _critic_phases(
    config: PPOConfig, size: ModelSize, models: dict, *, tokens: int, width: int, there: Parts
) -> dict[str, Parts]:
    """Return the critic's backward, while the actor's gradients are kept, and both updates."""
    actor, critic = models["actor"], models["critic"]
    phases = training_phases(
        "critic ",
        size,
        critic,
        config.critic_system,
        tokens=tokens,
        logits=0,
        width=width,
        there=sum_parts(there, {"gradients": max(actor.gradients, actor.waiting)}),
    )
    # The actor has stepped by then.
    phases["critic step"] = sum_parts(there, optimizer_step_parts(critic))
    phases["actor step"] = sum_parts(
        there, optimizer_step_parts(actor), {"gradients": critic.gradients}
    )
    return phases


def rows_of_evaluation(config: PPOConfig, *, world_size: int) -> int:
    """Return the number of held-out prompts that a rank generates for at a time."""
    return min(config.batch.per_device_eval_batch_size, -(-config.run.eval_prompts // world_size))


def _ppo_models(config: PPOConfig, *, world_size: int, dtype: str) -> tuple[dict, dict]:
    """Return sizes and footprints of actor, reference, reward models and critic, by role.

    If two roles share a model, only the role that trains is there.
    """
    width = WIDTHS[dtype]
    system = config.system
    options = config.model

    def size_of(name: str, flag: str, **more) -> ModelSize:
        return named_size(name, flag=flag, trust_remote_code=options.trust_remote_code, **more)

    def trained(size: ModelSize, role_system: SystemOptions, *, average: bool) -> Footprint:
        found = training_footprint(
            size,
            role_system,
            dtype=dtype,
            world_size=world_size,
            accumulation=config.batch.layout(config.schedule.gradient_accumulation_steps)[1],
            average=average,
        )
        if system.offload_idle_states:
            return replace(found, host=found.host + found.idle_host)
        return found

    def frozen(size: ModelSize, stage: int, offload: bool) -> Footprint:
        more: dict[str, Any] = dict(
            pin_memory=system.pin_memory, width=width, world_size=world_size
        )
        return inference_footprint(size, stage=stage, offload=offload, **more)

    actor = options.actor_model_name_or_path
    critic = options.critic_model_name_or_path
    flags = ("--actor_model_name_or_path", "--critic_model_name_or_path")
    own = size_of(actor, flags[0], lora=config.actor_lora, system=config.actor_system, role="actor")
    sizes = {"actor": own}
    models = {"actor": trained(own, config.actor_system, average=options.enable_ema)}
    if config.has_reference and not config.shares_reference:
        sizes["reference"] = size_of(
            actor, flags[0], lora=config.actor_lora, stored=config.actor_system.frozen_format
        )
        models["reference"] = frozen(
            sizes["reference"], system.actor_zero_stage, system.offload_reference_model
        )
    for i, path in enumerate(config.reward_models):
        if config.shares_reward and path == critic:
            continue
        flag = flags[1] if path == critic else "--reward_model_name_or_path"
        name = "reward" if i == 0 else f"reward {i + 1}"
        sizes[name] = size_of(
            path,
            flag,
            reward=True,
            lora=config.reward_lora(path),
            stored=config.reward_format,
        )
        models[name] = frozen(sizes[name], system.critic_zero_stage, system.offload_reward_model)
    if config.has_critic:
        sizes["critic"] = size_of(
            critic,
            flags[1],
            reward=True,
            lora=config.critic_lora,
            system=config.critic_system,
            role="critic",
        )
        models["critic"] = trained(sizes["critic"], config.critic_system, average=False)
    return sizes, models


def _group_size(config: PPOConfig) -> int:
    """Return the number of ranks that generate together."""
    return config.system.inference_tp_size if config.system.enable_hybrid_engine else 1


def _for_generation(
    config: PPOConfig, actor: ModelSize, *, rows: int, width: int
) -> tuple[Parts, Parts]:
    """Return the bytes of KV cache and replica.

    Returns:
        The parts that stay between rollouts, and the parts that are freed.
    """
    system = config.system
    positions = config.data.max_prompt_seq_len + config.data.max_answer_seq_len
    # A tensor-parallel group of N ranks generates N times the rows; each rank caches 1/N of the
    # heads.
    cache = width * actor.cache.elements(rows=rows, positions=positions)
    if system.generation_cache_gib:
        # At least one answer at its longest.
        least = width * actor.cache.elements(rows=1, positions=positions)
        cache = min(cache, max(least, int(system.generation_cache_gib * 2**30)))
    frees_cache = system.release_inference_cache or not system.enable_hybrid_engine
    frees_replica = system.unpin_actor_parameters or system.release_inference_cache
    resident: dict[str, float] = {}
    passing: dict[str, float] = {}
    (passing if frees_cache else resident)["KV cache"] = cache
    (passing if frees_replica else resident)["replica"] = _replica_bytes(config, actor, width=width)
    return resident, passing


def _replica_bytes(config: PPOConfig, actor: ModelSize, *, width: int) -> float:
    """Return the bytes of the Hybrid Engine's replica.

    They are 0 if it shares the training weights (ZeRO <= 2 without LoRA, or with attached adapters,
    which read quantized weights as they are). With merged LoRA they are the adapted layers. Under
    ZeRO-3 they are all weights, gathered; with tensor parallelism, this rank's slices of the layers
    and the rest of the model.
    """
    if not config.system.enable_hybrid_engine:
        return 0.0
    if config.system.actor_zero_stage == 3:
        size = config.system.inference_tp_size
        return width * (actor.parameters - actor.adapters - actor.split + actor.split / size)
    # Experts are merged copies in any case.
    attached = config.system.hybrid_lora == "attach"
    return width * (actor.adapted_experts if attached else actor.merged)


def _whole_layers_bytes(config: PPOConfig, actor: ModelSize, *, width: int) -> float:
    """Return the bytes of the layers that are gathered at once to cut tensor-parallel slices."""
    system = config.system
    if not system.enable_hybrid_engine or system.inference_tp_size == 1:
        return 0.0
    return width * actor.split * min(system.tp_gather_partition_size / actor.layers, 1.0)
