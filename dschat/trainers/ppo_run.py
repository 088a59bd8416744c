"""The run of step 3: rollout after rollout, with reports."""

from typing import Any

from dschat.algorithms.types import Experience
from dschat.checkpoint.run_state import RunState
from dschat.runtime import dist
from dschat.tracking.metrics import MetricsWriter
from dschat.tracking.progress import Progress
from dschat.trainers.ppo import DeepSpeedPPOTrainer
from dschat.trainers.ppo_metrics import rollout_flops
from dschat.trainers.rewards import RewardFailure
from dschat.trainers.rollout import print_answers


def run_state(trainer: DeepSpeedPPOTrainer, loader, metrics: MetricsWriter) -> RunState:
    """All of the run that changes from rollout to rollout; `loader` gives the training prompts."""
    engines = {"actor": trainer.engines.actor, "critic": trainer.engines.critic}
    state = RunState(
        trainer.config,
        loader=loader,
        window=trainer.config.batch.generation_batches,
        engines={name: engine for name, engine in engines.items() if engine is not None},
        metrics=metrics,
    )
    parts: dict[str, Any] = {"trainer": trainer, "ema": trainer.ema, "ptx": trainer.ptx}
    state.parts = {name: part for name, part in parts.items() if part is not None}
    state.facts = {"score_std": trainer.score_std}
    return state


def train_ppo(
    trainer: DeepSpeedPPOTrainer,
    state: RunState,
    evaluator,
    *,
    rollouts: int,
    metrics: MetricsWriter,
    tokenizer,
) -> None:
    """Up to `rollouts`: generate experience, learn from it, report.

    Args:
        state: gives the prompts, and after each rollout may save the run or stop it.
        evaluator: has ``evaluate(rollout) -> metrics``.
    """
    run = trainer.config.run
    progress = Progress("PPO", rollouts, interval_s=run.log_interval_s, done=state.step)
    with state:
        for step, batches in zip(range(state.step + 1, rollouts + 1), state.windows()):
            try:
                experience, answers, values = trainer.generate_experience(batches)
            except RewardFailure as error:
                raise stopped_by_reward(error, trainer, state) from error
            if run.print_answers and (step - 1) % run.print_answers_interval == 0:
                print_answers(answers, experience.scores, tokenizer)
            values |= trainer.train_rlhf(experience)
            values |= _speed(experience, values, trainer)
            failure = None
            if step == rollouts or (run.eval_interval and step % run.eval_interval == 0):
                try:
                    values |= evaluator.evaluate(step)
                except RewardFailure as error:
                    failure = error  # the rollout itself is done, and is to be kept
            metrics.write(step, values | _pipeline_tags(values))
            progress.update(step, _shown(values))
            if failure is not None:
                state.step = step
                raise stopped_by_reward(failure, trainer, state) from failure
            trainer.engines.train()  # a checkpoint needs idle states back from host memory
            state.end_step(last=step == rollouts)


def stopped_by_reward(
    failure: RewardFailure, trainer: DeepSpeedPPOTrainer, state: RunState
) -> RewardFailure:
    """`failure` with what is left of the run, which is saved first: no more is lost than the rollout that failed."""
    trainer.engines.train()  # a checkpoint needs idle states back from host memory
    if not state.save_unfinished():
        return failure
    return RewardFailure(
        f"{failure}\nA checkpoint holds the rollouts before it, step {state.step}: fix the reward, and continue with "
        "--resume latest."
    )


def _speed(
    experience: Experience, values: dict[str, float], trainer: DeepSpeedPPOTrainer
) -> dict[str, float]:
    tokens = dist.all_reduce(experience.attention_mask.sum()).item()
    seconds = values["time/generate_s"] + values["time/score_s"] + values["time/train_s"]
    engines, config = trainer.engines, trainer.config
    # A model's updates may make less than all passes: in the critic's warm-up, and where --target_kl ends them.
    one_pass = config.rollout_rows // config.batch.per_device_training_batch_size
    roles = (("policy", engines.actor), ("value", engines.critic))
    flops = rollout_flops(
        generated=[engines.actor.module],
        scored=[engine.module for engine in (*engines.trained, engines.ref, *engines.rewards)],
        trained=[
            (engine.module, values.get(f"{name}/micro_batches", 0.0) / one_pass)
            for name, engine in roles
            if engine is not None
        ],
    )
    return {
        "perf/tokens_per_s": tokens / seconds,
        "perf/tflops": flops * tokens / seconds / dist.world_size() / 1e12,
    }


def _pipeline_tags(values: dict[str, float]) -> dict[str, float]:
    """DeepSpeed-Chat's tags: means, and sums over a process's micro-batches; none of a model that did not learn."""
    tags = {"reward": values["objective/score"]}
    for tag, name in (("actor", "policy"), ("critic", "value")):
        if f"{name}/loss" in values:
            tags[f"{tag}_loss"] = values[f"{name}/loss"]
            tags[f"{tag}_loss_sum"] = values[f"{name}/loss"] * values[f"{name}/micro_batches"]
    return tags


def _shown(values: dict[str, float]) -> dict[str, str]:
    critic = (
        {"ev": f"{values['value/explained_variance']:.2f}"}
        if "value/explained_variance" in values
        else {}
    )
    return {
        "score": f"{values['objective/score']:.3f}",
        "KL": f"{values['objective/kl']:.2f}",
        "len": f"{values['response/length_mean']:.1f}",
        **critic,
        "s gen/score/train": "/".join(
            f"{values[f'time/{phase}_s']:.1f}" for phase in ("generate", "score", "train")
        ),
        "tok/s": f"{values['perf/tokens_per_s']:,.0f}",
    }
