"""Checks of a run before any weight is read: its memory plan, and the shapes of its models."""

from collections.abc import Iterable
from typing import Any

from dschat.config.ppo import PPOConfig
from dschat.generation.tensor_parallel import split_problems
from dschat.memory.model_size import ModelSize, find_config, named_size
from dschat.memory.plan import StepPlan, plan_step
from dschat.models.packing import check_takes_positions


def checked_plan(config, *, world_size: int, dtype: str, rewards: Iterable[str] = ()) -> StepPlan:
    """Return the memory plan of any step's configuration, after a check of its models.

    Args:
        config: of the step.
        world_size, rewards: see ``check_models``.
        dtype: bf16, fp16 or fp32.

    Raises:
        ValueError: a model has not enough positions for the texts, or its family cannot take
            packed rows; in step 3 see also ``check_models``.
    """
    plan = plan_step(config, world_size=world_size, dtype=dtype)
    if isinstance(config, PPOConfig):
        check_models(config, plan, world_size=world_size, rewards=rewards)
        return plan
    path = config.model.model_name_or_path
    check_length(config.data.max_seq_len, plan.sizes["model"], path)
    if config.batch.packing:
        trust = config.model.trust_remote_code
        shape = find_config(path, flag="--model_name_or_path", trust_remote_code=trust)
        check_takes_positions(shape, path=path)
    return plan


def check_length(length: int, size: ModelSize, path: str) -> None:
    """Check that a model has positions for texts of `length` tokens.

    Args:
        length: value of --max_seq_len.
        size: of the model.
        path: value of --model_name_or_path.

    Raises:
        ValueError: the model has not enough. The message names both flags.
    """
    if size.positions is not None and length > size.positions:
        raise ValueError(
            f"--max_seq_len {length}: --model_name_or_path {path} has learned "
            f"{size.positions} positions. Give {size.positions} or less; longer texts are cut."
        )


def check_models(
    config: PPOConfig, plan: StepPlan, *, world_size: int, rewards: Iterable[str] = ()
) -> None:
    """Check that the actor can be split, and that all models have positions for the longest text.

    Args:
        config: of step 3.
        plan: the run's memory plan, with the sizes of actor and critic.
        world_size: ranks of the run.
        rewards: reward models that read the actor's tokens; others cut longer texts.

    Raises:
        ValueError: --inference_tp_size does not divide the actor, or a model has not enough
            positions. The message names flags, values and remedies.
    """
    options = config.model
    system = config.system
    found = []
    trust: dict[str, Any] = dict(trust_remote_code=options.trust_remote_code)
    flag = "--actor_model_name_or_path"
    actor = options.actor_model_name_or_path
    if system.enable_hybrid_engine:
        shape = find_config(actor, flag=flag, **trust)
        found += split_problems(shape, system.inference_tp_size, world_size=world_size)
    positions = {(flag, actor): plan.sizes["actor"].positions}
    if "critic" in plan.sizes:
        flag = "--critic_model_name_or_path"
        positions[flag, options.critic_model_name_or_path] = plan.sizes["critic"].positions
    for path in rewards:
        role = "reward" if path in options.reward_model_name_or_path else "critic"
        flag = f"--{role}_model_name_or_path"
        positions[flag, path] = named_size(path, flag=flag, reward=True, **trust).positions
    data = config.data
    length = data.max_prompt_seq_len + data.max_answer_seq_len
    found += [
        f"--max_prompt_seq_len {data.max_prompt_seq_len} and --max_answer_seq_len "
        f"{data.max_answer_seq_len} make texts of {length} tokens, and {flag} {path} has learned "
        f"{most} positions: give lengths that add up to {most} or less."
        for (flag, path), most in positions.items()
        if most is not None and length > most
    ]
    if found:
        raise ValueError("\n".join(found))
