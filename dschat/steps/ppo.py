"""Step 3: train the SFT model with PPO against the reward."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from dschat.checkpoint.run_checkpoint import Checkpoint
from dschat.checkpoint.run_state import find_checkpoint, saved_dtype
from dschat.checkpoint.save_model import save_model
from dschat.config.no_effect import announce
from dschat.config.parse import step_title
from dschat.config.ppo import PPOConfig
from dschat.config.ppo_options import MODEL_FOLDERS
from dschat.data.collate import collate_prompts
from dschat.data.datasets import PromptDataset
from dschat.data.loaders import (
    GivenTables,
    build_prompt_data,
    first_rows,
    make_loaders,
    open_prompt_rows,
)
from dschat.data.ptx import PTXBatches, load_texts
from dschat.engine.build import start_processes
from dschat.engine.device import resolve_dtype
from dschat.models.causal_lm import load_config
from dschat.models.tokenizer import eos_token_ids, load_tokenizer
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.runtime.seeds import seed_everything
from dschat.tracking.callbacks import Callback, Callbacks
from dschat.trainers.dynamic_sampling import ExtraPrompts
from dschat.trainers.evaluation import PolicyEvaluator
from dschat.trainers.inputs import Check, model_checks, with_other_faults
from dschat.trainers.output_folder import (
    open_metrics,
    prepare_output_dir,
    record_run,
    write_pages,
)
from dschat.trainers.ppo import DeepSpeedPPOTrainer
from dschat.trainers.ppo_run import run_state, train_ppo
from dschat.trainers.preflight import fitted, show_plan
from dschat.trainers.reward_plan import RewardPlan, plan_rewards
from dschat.trainers.rlhf_engine import DeepSpeedRLHFEngine

# Scores with a smaller standard deviation are not divided by it: it would be noise.
SMALLEST_SCORE_STD = 1e-4


def run_ppo(
    config: PPOConfig,
    *,
    given: GivenTables | None = None,
    functions: Mapping[str, Callable] | None = None,
    callbacks: Iterable[Callback] = (),
) -> None:
    """Run step 3, and save the models below --output_dir.

    Args:
        config: of the run.
        given: rows in memory, see ``open_blends``.
        functions: Python objects by the value of --reward_fn that stands for them.
        callbacks: called during the run.
    """
    run = config.run
    start_processes(run.local_rank)
    config = fitted(config)
    announce(config)
    prepare_output_dir(run.output_dir, step=step_title(PPOConfig), below=MODEL_FOLDERS)
    checkpoint = find_checkpoint(config)
    seed_everything(run.seed)
    dtype = resolve_dtype(config.model.dtype, saved=saved_dtype(checkpoint))
    open_rows = partial(open_prompt_rows, config.data, given=given)
    plan = load_plan(config, functions=functions, open_rows=open_rows)
    tokenizer = plan.tokenizer
    planned = show_plan(config, dtype=dtype, rewards=plan.models_reading_actor_tokens())
    train_loader, eval_loader, ptx = load_data(config, tokenizer, given=given)
    rollouts = config.num_rollouts(len(train_loader) // config.batch.generation_batches)

    engines = DeepSpeedRLHFEngine(
        config, tokenizer=tokenizer, dtype=dtype, total_steps=rollouts * config.updates_per_rollout
    )
    eos_ids = eos_token_ids(engines.actor.module.generation_config, tokenizer)
    evaluator = build_evaluator(plan, engines, eval_loader, eos_ids=eos_ids)
    if checkpoint:
        before = None
        score_std = checkpoint.facts["score_std"]
    else:
        before = evaluator.evaluate(0)
        score_std = reward_scale(config, before["eval/score_sd"])
    if config.has_critic:
        engines.build_critic(tokenizer=plan.critic_tokenizer, score_std=score_std)
    record_run(
        config,
        run.output_dir,
        dtype=dtype,
        text_format=train_loader.dataset.text_format,
        rollouts=rollouts,
        score_std=score_std,
        resumed_from=checkpoint.step if checkpoint else None,
        planned_memory_gib=planned,
    )
    trainer = build_trainer(
        plan, engines, train_loader.dataset, eos_ids=eos_ids, score_std=score_std, ptx=ptx
    )
    train(
        trainer,
        train_loader,
        evaluator,
        checkpoint,
        rollouts=rollouts,
        before=before,
        plan=plan,
        callbacks=Callbacks(callbacks),
    )


def build_evaluator(
    plan: RewardPlan, engines: DeepSpeedRLHFEngine, loader, *, eos_ids: tuple[int, ...]
) -> PolicyEvaluator:
    """Build the evaluator of the policy.

    Args:
        plan: of the rewards, whose models load now.
        engines: of actor and reference.
        loader: of held-out prompts.
        eos_ids: the ids that end an answer.
    """
    config = plan.config
    return PolicyEvaluator(
        engines,
        plan.build(engines, loader.dataset),
        loader,
        plan.tokenizer,
        max_new_tokens=config.data.max_answer_seq_len,
        eos_token_ids=eos_ids,
        seed=config.run.seed,
        output_dir=config.run.output_dir,
        log_interval_s=config.run.log_interval_s,
    )


def build_trainer(
    plan: RewardPlan,
    engines: DeepSpeedRLHFEngine,
    dataset: PromptDataset,
    *,
    eos_ids: tuple[int, ...],
    score_std: float,
    ptx: PTXBatches | None,
) -> DeepSpeedPPOTrainer:
    """Build the PPO trainer.

    Args:
        plan: of the rewards.
        engines: of all models.
        dataset: training prompts.
        eos_ids: the ids that end an answer.
        score_std: divisor of the scores.
        ptx: batches of the PTX loss, or None.
    """
    config = plan.config
    pad_id = plan.tokenizer.pad_token_id
    return DeepSpeedPPOTrainer(
        engines,
        config,
        plan.build(engines, dataset),
        eos_token_ids=eos_ids,
        pad_token_id=pad_id,
        score_std=score_std,
        ptx=ptx,
        extra_prompts=ExtraPrompts(
            dataset,
            partial(collate_prompts, pad_id=pad_id),
            size=config.batch.per_device_generation_batch_size,
            seed=config.run.seed,
        ),
    )


def train(
    trainer: DeepSpeedPPOTrainer,
    loader,
    evaluator: PolicyEvaluator,
    checkpoint: Checkpoint | None,
    *,
    rollouts: int,
    before: dict[str, float] | None,
    plan: RewardPlan,
    callbacks: Callbacks,
) -> None:
    """Train from the beginning or from `checkpoint`, and save the models.

    Args:
        trainer: the PPO trainer.
        loader: of training prompts.
        evaluator: evaluates the policy.
        checkpoint: to resume from; None: start from the beginning.
        rollouts: number of rollouts of the whole run.
        before: the evaluation before training; None if the run is resumed.
        plan: holds the tokenizers and the reward functions.
        callbacks: called during the run.
    """
    config = trainer.config
    run = config.run
    # A seed for each rank: with equal random numbers, the samples of ranks would be correlated.
    seed_everything(run.seed + dist.rank())
    done = checkpoint.step if checkpoint else None
    metrics = open_metrics(config, number=3, resume_from=done)
    if before:
        metrics.write(0, before)
        metrics.write_samples(0, evaluator.samples)
        callbacks.on_evaluate(0, before)
    state = run_state(trainer, loader, metrics, callbacks=callbacks, functions=plan.functions)
    state.restore(checkpoint)
    evaluator.delete_answers_after(state.step)
    train_ppo(
        trainer, state, evaluator, rollouts=rollouts, metrics=metrics, tokenizer=plan.tokenizer
    )
    metrics.close()
    # Frees memory for saving. CUDA graphs must be deleted before their process groups.
    trainer.engines.generator.shutdown()
    save(config, trainer, plan.tokenizer, plan.critic_tokenizer)
    if run.output_dir is not None:
        callbacks.on_save(Path(run.output_dir))


def load_plan(
    config: PPOConfig, *, functions: Mapping[str, Callable] | None, open_rows: Check
) -> RewardPlan:
    """Load the tokenizers and functions of a run, and check that its models can be loaded.

    Raises:
        ValueError: for one or more of the models, functions and data; tells all faults.
    """
    options = config.model
    flag = "--actor_model_name_or_path"
    try:
        tokenizer = actor_tokenizer(config)
        load_config(
            options.actor_model_name_or_path,
            flag=flag,
            trust_remote_code=options.trust_remote_code,
        )
        return plan_rewards(config, tokenizer, functions=functions)
    except ValueError as error:
        raise with_other_faults(error, [*model_checks(options), open_rows]) from error


def actor_tokenizer(config: PPOConfig):
    """Load the tokenizer of --actor_model_name_or_path."""
    return load_tokenizer(
        config.model.actor_model_name_or_path,
        add_eot_token=config.model.add_eot_token,
        eot_token=config.model.eot_token,
        trust_remote_code=config.model.trust_remote_code,
        flag="--actor_model_name_or_path",
    )


def reward_scale(config: PPOConfig, score_sd: float) -> float:
    """Return the divisor of the scores: their standard deviation before training, or 1.

    It is logged, since the clips and the KL coefficient apply to divided scores.
    """
    if not config.ppo.normalize_reward:
        return 1.0
    if not score_sd > SMALLEST_SCORE_STD:
        logger.warning(
            f"the scores before training hardly differ (standard deviation {score_sd:.3g}), so "
            "they are not divided by it"
        )
        return 1.0
    logger.info(f"scores are divided by {score_sd:.4g}, their standard deviation before training")
    return score_sd


def load_data(config: PPOConfig, tokenizer, *, given: GivenTables | None = None):
    """Load the prompts and the PTX texts.

    Returns:
        The loader of training prompts, that of held-out prompts, and endless PTX batches or None.
    """
    data = config.data
    run = config.run
    train_data, eval_data = build_prompt_data(
        data, tokenizer, max_prompt_len=data.max_prompt_seq_len, given=given
    )
    train_loader, eval_loader = make_loaders(
        train_data,
        first_rows(eval_data, run.eval_prompts),
        collate_prompts,
        pad_id=tokenizer.pad_token_id,
        train_batch_size=config.batch.per_device_generation_batch_size,
        eval_batch_size=config.batch.per_device_eval_batch_size,
        window=config.batch.generation_batches,
        seed=run.seed,
    )
    ptx = None
    if data.unsupervised_dataset_name:
        texts = load_texts(
            data.unsupervised_dataset_name,
            data.unsupervised_dataset_config_name,
            data.data_output_path,
        )
        ptx = PTXBatches(
            texts,
            tokenizer,
            batch_size=config.batch.per_device_training_batch_size,
            block_size=data.max_prompt_seq_len + data.max_answer_seq_len,
            rank=dist.rank(),
            world_size=dist.world_size(),
            seed=run.seed,
        )
    return train_loader, eval_loader, ptx


def save(config: PPOConfig, trainer: DeepSpeedPPOTrainer, tokenizer, critic_tokenizer) -> None:
    """Save the actor and, if the run has them, critic and moving average below --output_dir."""
    if config.run.output_dir is None:
        return
    output = Path(config.run.output_dir)
    engines = trainer.engines
    save_model(engines.actor.module, tokenizer, output / "actor")
    if engines.critic is not None:
        save_model(engines.critic.module.model, critic_tokenizer, output / "critic")
    if trainer.ema is not None:
        save_model(
            engines.actor.module,
            tokenizer,
            output / "actor_ema",
            tensors=trainer.ema.full_tensors(),
        )
    write_pages(config.run.output_dir)
