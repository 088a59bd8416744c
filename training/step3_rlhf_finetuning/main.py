"""Step 3: train the SFT model with PPO against the reward."""

from functools import partial
from pathlib import Path

from dschat.config.parse import parse_config, step_title
from dschat.config.ppo import PPOConfig
from dschat.runtime.log import logger, run_main

if __name__ == "__main__":
    # Stop at a wrong flag or --help before the imports below, which take seconds.
    run_main(partial(parse_config, PPOConfig))

from dschat.checkpoint.run_checkpoint import Checkpoint
from dschat.checkpoint.run_state import find_checkpoint, saved_dtype
from dschat.checkpoint.save_model import save_model
from dschat.config.no_effect import announce
from dschat.config.ppo_options import MODEL_FOLDERS
from dschat.data.collate import collate_prompts
from dschat.data.loaders import build_prompt_data, first_rows, make_loaders
from dschat.data.ptx import PTXBatches, load_texts
from dschat.engine.build import start_processes
from dschat.engine.device import resolve_dtype
from dschat.models.tokenizer import eos_token_ids, load_tokenizer
from dschat.runtime import dist
from dschat.runtime.seeds import seed_everything
from dschat.trainers.dynamic_sampling import ExtraPrompts
from dschat.trainers.evaluation import PolicyEvaluator
from dschat.trainers.output_folder import (
    open_metrics,
    prepare_output_dir,
    record_run,
    write_pages,
)
from dschat.trainers.ppo import DeepSpeedPPOTrainer
from dschat.trainers.ppo_run import run_state, train_ppo
from dschat.trainers.preflight import dry_run, show_plan
from dschat.trainers.reward_plan import RewardPlan, plan_rewards
from dschat.trainers.rlhf_engine import DeepSpeedRLHFEngine

# Scores with a smaller standard deviation are not divided by it: it would be noise.
SMALLEST_SCORE_STD = 1e-4


def main() -> None:
    """Run step 3."""
    config = parse_config(PPOConfig)
    if config.run.dry_run:
        return dry_run(config)
    data = config.data
    run = config.run
    start_processes(run.local_rank)
    announce(config)
    prepare_output_dir(run.output_dir, step=step_title(PPOConfig), below=MODEL_FOLDERS)
    checkpoint = find_checkpoint(config)
    seed_everything(run.seed)
    dtype = resolve_dtype(config.model.dtype, saved=saved_dtype(checkpoint))
    tokenizer = actor_tokenizer(config)
    plan = plan_rewards(config, tokenizer)
    planned = show_plan(config, dtype=dtype, rewards=plan.models_reading_actor_tokens())
    train_loader, eval_loader, ptx = load_data(config, tokenizer)
    rollouts = config.num_rollouts(len(train_loader) // config.batch.generation_batches)

    engines = DeepSpeedRLHFEngine(
        config, tokenizer=tokenizer, dtype=dtype, total_steps=rollouts * config.updates_per_rollout
    )
    eos_ids = eos_token_ids(engines.actor.module.generation_config, tokenizer)
    evaluator = PolicyEvaluator(
        engines,
        plan.build(engines, eval_loader.dataset),
        eval_loader,
        tokenizer,
        max_new_tokens=data.max_answer_seq_len,
        eos_token_ids=eos_ids,
        seed=run.seed,
        output_dir=run.output_dir,
        log_interval_s=run.log_interval_s,
    )
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
    trainer = DeepSpeedPPOTrainer(
        engines,
        config,
        plan.build(engines, train_loader.dataset),
        eos_token_ids=eos_ids,
        pad_token_id=tokenizer.pad_token_id,
        score_std=score_std,
        ptx=ptx,
        extra_prompts=ExtraPrompts(
            train_loader.dataset,
            partial(collate_prompts, pad_id=tokenizer.pad_token_id),
            size=config.batch.per_device_generation_batch_size,
            seed=run.seed,
        ),
    )
    train(trainer, train_loader, evaluator, checkpoint, rollouts=rollouts, before=before, plan=plan)


def train(
    trainer: DeepSpeedPPOTrainer,
    loader,
    evaluator: PolicyEvaluator,
    checkpoint: Checkpoint | None,
    *,
    rollouts: int,
    before: dict[str, float] | None,
    plan: RewardPlan,
) -> None:
    """Train from the beginning or from `checkpoint`, and save the models.

    Args:
        trainer: the PPO trainer.
        loader: of training prompts.
        evaluator: evaluates the policy.
        checkpoint: to resume from; None: start from the beginning.
        rollouts: number of rollouts of the whole run.
        before: the evaluation before training; None if the run is resumed.
        plan: holds the tokenizers.
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
    state = run_state(trainer, loader, metrics)
    state.restore(checkpoint)
    evaluator.delete_answers_after(state.step)
    train_ppo(
        trainer, state, evaluator, rollouts=rollouts, metrics=metrics, tokenizer=plan.tokenizer
    )
    metrics.close()
    # Frees memory for saving. CUDA graphs must be deleted before their process groups.
    trainer.engines.generator.shutdown()
    save(config, trainer, plan.tokenizer, plan.critic_tokenizer)


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


def load_data(config: PPOConfig, tokenizer):
    """Load the prompts and the PTX texts.

    Returns:
        The loader of training prompts, that of held-out prompts, and endless PTX batches or None.
    """
    data = config.data
    run = config.run
    train_data, eval_data = build_prompt_data(
        data, tokenizer, max_prompt_len=data.max_prompt_seq_len
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


if __name__ == "__main__":
    run_main(main)
