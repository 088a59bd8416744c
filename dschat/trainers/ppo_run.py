"""The training loop of step 3: rollouts, updates, evaluations and reports."""

from collections.abc import Callable, Mapping
from typing import Any

from dschat.algorithms.types import Experience
from dschat.checkpoint.run_state import RunState
from dschat.runtime import dist
from dschat.tracking.alarms import AlarmLog
from dschat.tracking.callbacks import Callbacks
from dschat.tracking.metrics import MetricsWriter
from dschat.tracking.progress import Progress
from dschat.trainers.ppo import DeepSpeedPPOTrainer
from dschat.trainers.ppo_metrics import rollout_flops
from dschat.trainers.rewards import RewardFailure, function_digest
from dschat.trainers.rollout import print_answers
from dschat.trainers.saved_rollouts import SavedRollouts


def run_state(
    trainer: DeepSpeedPPOTrainer,
    loader,
    metrics: MetricsWriter,
    *,
    callbacks: Callbacks | None = None,
    functions: Mapping[str, Callable] | None = None,
) -> RunState:
    """Return the state of a PPO run: everything that changes from rollout to rollout.

    Args:
        trainer: holds the engines, the moving average and the PTX batches.
        loader: of training prompts.
        metrics: the metrics file.
        callbacks: called during the run.
        functions: those of the rewards, by the value of --reward_fn.
    """
    engines = {"actor": trainer.engines.actor, "critic": trainer.engines.critic}
    state = RunState(
        trainer.config,
        loader=loader,
        window=trainer.config.batch.generation_batches,
        engines={name: engine for name, engine in engines.items() if engine is not None},
        metrics=metrics,
        callbacks=callbacks,
    )
    parts: dict[str, Any] = {"trainer": trainer, "ema": trainer.ema, "ptx": trainer.ptx}
    state.parts = {name: part for name, part in parts.items() if part is not None}
    if trainer.ptx is not None:
        state.texts["--unsupervised_dataset_name"] = trainer.ptx.digest
    for name in trainer.config.model.reward_fn:
        digest = function_digest(name, functions)
        if digest is not None:
            state.programs[f"--reward_fn {name}"] = digest
    state.facts = {"score_std": trainer.score_std, "dtype": trainer.engines.dtype}
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
    """Generate experience, learn from it and report, until `rollouts` are done.

    Args:
        trainer: the PPO trainer.
        state: gives the prompts, and after each rollout may save the run or stop it; its callbacks
            are called.
        evaluator: has ``evaluate(rollout) -> metrics``, and ``samples`` of the last evaluation.
        rollouts: number of rollouts of the whole run.
        metrics: gets the metrics of each rollout.
        tokenizer: the actor's, to print and save answers.

    Raises:
        RewardFailure: a reward failed; the rollouts before it have been saved if possible.
        Stopped: a signal was received; the state has been saved if possible.
    """
    run = trainer.config.run
    progress = Progress("PPO", rollouts, interval_s=run.log_interval_s, done=state.step)
    alarms = AlarmLog(run.output_dir, last=state.step)
    saved = SavedRollouts(
        run.output_dir,
        tokenizer,
        interval=run.save_rollouts,
        has_reference=trainer.config.has_reference,
    )
    saved.delete_after(state.step)
    with state:
        for rollout, batches in zip(range(state.step + 1, rollouts + 1), state.windows()):
            try:
                experience, answers, values = trainer.generate_experience(batches)
            except RewardFailure as error:
                raise saved_failure(error, trainer, state) from error
            if run.print_answers and (rollout - 1) % run.print_answers_interval == 0:
                print_answers(answers, experience.scores, tokenizer)
            saved.save(rollout, experience, answers)
            if state.callbacks.read_rollouts:
                state.callbacks.on_rollout(rollout, saved.rows(experience, answers))
            values |= trainer.train_rlhf(experience)
            values |= _speed(experience, values, trainer)
            failure = None
            is_due = run.eval_interval and rollout % run.eval_interval == 0
            if is_due or rollout == rollouts:
                try:
                    values |= evaluator.evaluate(rollout)
                    metrics.write_samples(rollout, evaluator.samples)
                except RewardFailure as error:
                    failure = error  # raised below: this rollout is done and must be kept
            metrics.write(rollout, values | _pipeline_tags(values))
            alarms.update(rollout, values)
            progress.update(rollout, _progress_fields(values))
            state.callbacks.on_update(rollout, values)
            state.callbacks.on_evaluate(rollout, values)
            if failure is not None:
                state.step = rollout
                raise saved_failure(failure, trainer, state) from failure
            trainer.engines.train()  # a checkpoint needs idle states back from host memory
            state.end_step(last=rollout == rollouts)


def saved_failure(
    failure: RewardFailure, trainer: DeepSpeedPPOTrainer, state: RunState
) -> RewardFailure:
    """Save the rollouts before `failure`, and return the failure with how to resume after them."""
    trainer.engines.train()  # a checkpoint needs idle states back from host memory
    if not state.save_unfinished():
        return failure
    return RewardFailure(
        f"{failure}\nCheckpoint saved after rollout {state.step}. Fix the reward, then rerun the "
        "same command with --resume latest to continue."
    )


def _speed(
    experience: Experience, values: dict[str, float], trainer: DeepSpeedPPOTrainer
) -> dict[str, float]:
    """Return the speed of a rollout and its updates, over all ranks."""
    tokens = dist.all_reduce(experience.attention_mask.sum()).item()
    seconds = values["time/generate_s"] + values["time/score_s"] + values["time/train_s"]
    engines = trainer.engines
    config = trainer.config
    # A model may learn from less than all passes: during the critic's warm-up, and after
    # --target_kl has ended the updates.
    one_pass = config.rollout_rows // config.rows_per_update
    roles = (("policy", engines.actor), ("value", engines.critic))
    flops = rollout_flops(
        generated=[engines.actor.module],
        scored=[engine.module for engine in (*engines.trained, *engines.frozen)],
        trained=[
            (engine.module, values.get(f"{name}/updates", 0.0) / one_pass)
            for name, engine in roles
            if engine is not None
        ],
    )
    return {
        "perf/tokens_per_s": tokens / seconds,
        "perf/tflops": flops * tokens / seconds / dist.world_size() / 1e12,
    }


def _pipeline_tags(values: dict[str, float]) -> dict[str, float]:
    """Return metrics under DeepSpeed-Chat's names: means, and sums over a rank's micro-batches.

    A model that did not learn in this rollout has none.
    """
    tags = {"reward": values["objective/score"]}
    for tag, name in (("actor", "policy"), ("critic", "value")):
        if f"{name}/loss" in values:
            tags[f"{tag}_loss"] = values[f"{name}/loss"]
            tags[f"{tag}_loss_sum"] = values[f"{name}/loss"] * values[f"{name}/micro_batches"]
    return tags


def _progress_fields(values: dict[str, float]) -> dict[str, str]:
    """Return the fields of the progress line."""
    kl = {}
    if "objective/kl" in values:
        kl["KL"] = f"{values['objective/kl']:.2f}"
    return {
        "score": f"{values['objective/score']:.3f}",
        **kl,
        "len": f"{values['response/length_mean']:.0f}",
        "tok/s": f"{values['perf/tokens_per_s']:,.0f}",
    }
