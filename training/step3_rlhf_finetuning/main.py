"""Step 3: PPO of the SFT model against the reward model."""

from pathlib import Path

from dschat.config.parse import parse_config
from dschat.config.steps import PPOConfig
from dschat.data.collate import collate_prompts
from dschat.data.loaders import build_prompt_data, first_rows, make_loaders
from dschat.engine.build import resolve_dtype, start_processes
from dschat.engine.checkpoint import save_model
from dschat.models.tokenizer import eos_token_ids, load_tokenizer
from dschat.tracking import dist
from dschat.tracking.log import run_main
from dschat.tracking.metrics import MetricsWriter
from dschat.trainers.evaluation import PolicyEvaluator
from dschat.trainers.ppo import DeepSpeedPPOTrainer, train_ppo
from dschat.trainers.rlhf_engine import DeepSpeedRLHFEngine
from dschat.trainers.setup import announce, prepare_output_dir, record_run, seed_everything


def main() -> None:
    config = parse_config(PPOConfig)
    run, model = config.run, config.model
    start_processes(run.local_rank)
    announce(config)
    prepare_output_dir(run.output_dir)
    seed_everything(run.seed)
    dtype = resolve_dtype(model.dtype)
    tokens = dict(
        add_eot_token=model.add_eot_token, eot_token=model.eot_token, trust_remote_code=model.trust_remote_code
    )
    tokenizer = load_tokenizer(model.actor_model_name_or_path, flag="--actor_model_name_or_path", **tokens)
    critic_tokenizer = load_tokenizer(model.critic_model_name_or_path, flag="--critic_model_name_or_path", **tokens)

    train_data, eval_data = build_prompt_data(config.data, tokenizer, max_prompt_len=config.data.max_prompt_seq_len)
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
    rollouts = config.schedule.max_train_steps or (
        len(train_loader) // config.batch.generation_batches * config.schedule.num_train_epochs
    )
    if run.enable_test_mode and run.test_stop_step:
        rollouts = min(rollouts, run.test_stop_step)

    engines = DeepSpeedRLHFEngine(
        config,
        tokenizer=tokenizer,
        critic_tokenizer=critic_tokenizer,
        dtype=dtype,
        total_steps=rollouts * config.updates_per_rollout,
    )
    eos_ids = eos_token_ids(engines.actor.module.generation_config, tokenizer)
    evaluator = PolicyEvaluator(
        engines,
        eval_loader,
        tokenizer,
        max_new_tokens=config.data.max_answer_seq_len,
        eos_token_ids=eos_ids,
        seed=run.seed,
        output_dir=run.output_dir,
    )
    before = evaluator.evaluate(0)
    score_std = max(before["eval/score_sd"], 1e-6) if config.ppo.normalize_reward else 1.0
    engines.build_critic(score_std=score_std)
    record_run(config, run.output_dir, dtype=dtype, rollouts=rollouts, score_std=score_std)
    events = f"{run.tensorboard_path}/step3_tensorboard_logs" if run.enable_tensorboard else None
    metrics = MetricsWriter(run.output_dir, tensorboard_dir=events)
    metrics.write(0, before)

    trainer = DeepSpeedPPOTrainer(
        engines, config, eos_token_ids=eos_ids, pad_token_id=tokenizer.pad_token_id, score_std=score_std
    )
    # Ranks answer different prompts; equal draws would make their samples alike.
    seed_everything(run.seed + dist.rank())
    train_ppo(trainer, train_loader, evaluator, rollouts=rollouts, metrics=metrics, tokenizer=tokenizer)
    metrics.close()
    if run.output_dir is not None:
        output = Path(run.output_dir)
        save_model(engines.actor.module, tokenizer, output / "actor")
        save_model(engines.critic.module.model, critic_tokenizer, output / "critic")


if __name__ == "__main__":
    run_main(main)
