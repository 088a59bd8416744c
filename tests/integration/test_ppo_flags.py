"""Flags of step 3 that change what PPO computes, in whole runs: metrics.jsonl shows the effect."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from launches import Case, Outcome
from outputs import load_plainly
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RANKS = 2
RATE = 1e-3
TOY = "--data_path {stock}/toy"
CRITIC = "--critic_model_name_or_path {stock}/reward/llama"
COMMON = (
    "--actor_model_name_or_path {stock}/sft/llama --data_split 0,0,1 --max_prompt_seq_len 24 "
    "--dtype fp32 "
    f"--actor_learning_rate {RATE} --critic_learning_rate {RATE} --num_warmup_steps 0 "
    "--lr_scheduler_type linear "
    "--per_device_training_batch_size 2 --eval_prompts 8 --per_device_eval_batch_size 32"
)
ROWS = "--per_device_generation_batch_size 4"  # two optimizer steps a pass


def case(name: str, *words: str, rollouts: int = 2, length: int = 6) -> Case:
    argv = f"{COMMON} {' '.join(words)} --max_train_steps {rollouts} --max_answer_seq_len {length}"
    return Case(f"flags-{name}", ranks=RANKS, step=3, argv=argv)


RLOO = case(
    "rloo",
    "--data_path {stock}/items --per_device_generation_batch_size 2 --num_samples_per_prompt 2",
    "--advantage_estimator rloo --reward_fn {stock}/rewards.py:number",
)
WARMUP_FLAGS = (TOY, CRITIC, ROWS, "--critic_warmup_steps 2 --ppo_epochs 2")
WARMUP = case("warmup", *WARMUP_FLAGS, "--eval_interval 3", rollouts=4)
WARMUP_ALONE = case("warmup-alone", *WARMUP_FLAGS)
EPOCHS = (TOY, CRITIC, ROWS, "--ppo_epochs 4 --enable_tensorboard --tensorboard_path {out}/events")
ALL_EPOCHS = case("all-epochs", *EPOCHS)
ONE_EPOCH = case("one-epoch", *EPOCHS, "--target_kl 1e-9")
SAMPLED = case(
    "sampled",
    f"{TOY} {CRITIC} {ROWS} --temperature 0.7 --top_k 0 --missing_eos_penalty 3 --reward_clip 2 "
    "--min_answer_len 4",
    "--kl_estimator k3 --no_whiten_advantages --enable_hybrid_engine --no_compile",
    "--gradient_accumulation_steps 2 --reward_fn {stock}/rewards.py:quarter",
    length=5,
)
FUNCTION = case("function", TOY, CRITIC, ROWS, "--reward_fn {stock}/rewards.py:vowels", rollouts=1)
WEIGHTS = (2.0, -0.5)
LORA_RATES = {"actor": 3e-3, "critic": 7e-3}
LORA = " ".join(
    f"--{role}_lora_dim 4 --{role}_lora_learning_rate {rate}" for role, rate in LORA_RATES.items()
)
BOTH = case(
    "both",
    f"{TOY} {CRITIC} {ROWS} {LORA} --only_optimize_lora "
    f"--reward_model_name_or_path {{stock}}/reward/llama",
    f"--reward_fn {{stock}}/rewards.py:vowels --reward_weights {WEIGHTS[0]} {WEIGHTS[1]}",
    rollouts=1,
)
DRAWS = [
    "--greedy_rollouts",
    "--top_k 1",
    "--top_p 1e-4",
    "--temperature 1e-4",
    "--top_k 0 --top_p 1",
]
SAMPLINGS, GROUPS = (
    Case(
        f"flags-{name}",
        ranks=RANKS,
        function=f"ppo_flag_checks.py:{name}",
        kwargs={"stock": "{stock}", "flags": flags},
    )
    for name, flags in (
        ("samplings", DRAWS),
        ("lora_rates", f"{LORA} --actor_learning_rate 1e-3 --critic_learning_rate 2e-3"),
    )
)


def evaluation(outcome: Outcome, rollout: int) -> list[dict]:
    file = outcome.out / "evaluation" / f"rollout_{rollout:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def reward(stock: Path, name: str):
    spec = importlib.util.spec_from_file_location("stock_rewards", stock / "rewards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.cases(RLOO)
def test_rloo_takes_scores_from_a_function_and_builds_no_critic(launches, stock):
    outcome = launches[RLOO]
    assert (
        not (outcome.out / "critic").exists() and (outcome.out / "actor" / "config.json").exists()
    )
    names = {name for line in outcome.metrics() for name in line}
    assert not {name for name in names if "critic" in name or name.startswith("value/")}
    assert {"policy/loss", "actor_loss", "objective/score"} <= names
    for rollout in (0, 2):
        rows = evaluation(outcome, rollout)
        numbers = [int(row["prompt"].split()[1]) for row in rows]
        expected = reward(stock, "number")(
            [row["prompt"] for row in rows], [row["answer"] for row in rows], number=numbers
        )
        assert [row["score"] for row in rows] == expected and len(set(expected)) == 8
    # The function raises if a sampled answer's prompt has another one's number.
    assert all(line["objective/score_std"] > 1 for line in outcome.metrics()[1:])
    for line in outcome.metrics()[1:]:
        assert line["rewards/number"] == pytest.approx(line["objective/score"], rel=1e-6)
        assert line["rewards_applied/number"] == 1 and "rewards_failed/number" not in line


@pytest.mark.cases(WARMUP, WARMUP_ALONE)
def test_the_actor_is_not_updated_during_critic_warmup(launches, stock):
    lines = launches[WARMUP].metrics()[1:]
    assert [
        ("policy/loss" in line, "actor_loss" in line, "value/loss" in line) for line in lines
    ] == [
        *[(False, False, True)] * 2,
        *[(True, True, True)] * 2,
    ]
    assert [line["value/micro_batches"] for line in lines] == [4] * 4
    assert [line["policy/micro_batches"] for line in lines[2:]] == [4] * 2
    assert all(line["objective/kl"] == pytest.approx(0, abs=1e-6) for line in lines[:3])
    assert abs(lines[3]["objective/kl"]) > 1e-4
    # Linear schedules, each as long as its model learns: the rates at the last rollout's beginning.
    rates = [lines[3][f"lr/{name}"] for name in ("actor", "critic")]
    assert rates == pytest.approx([RATE * 1 / 2, RATE * 1 / 4])
    outcome = launches[WARMUP_ALONE]
    before, after = (
        load_plainly(path).state_dict() for path in (stock / "sft" / "llama", outcome.out / "actor")
    )
    assert all(torch.equal(after[name], before[name]) for name in before)
    folders = (stock / "reward" / "llama", outcome.out / "critic")
    before, after = (load_plainly(path, reward=True).state_dict() for path in folders)
    # The head is divided once by the scores' deviation, whether it learns or not.
    assert all(not torch.equal(after[name], before[name]) for name in before if "proj" in name)


@pytest.mark.cases(WARMUP)
def test_evaluations_come_at_every_interval_and_at_the_end(launches):
    outcome = launches[WARMUP]
    assert [line["step"] for line in outcome.metrics() if "eval/score" in line] == [0, 3, 4]
    files = sorted(path.name for path in (outcome.out / "evaluation").iterdir())
    assert files == [f"rollout_{step:06d}.jsonl" for step in (0, 3, 4)]
    for line in outcome.metrics():
        if "eval/score" in line:
            scores = [row["score"] for row in evaluation(outcome, line["step"])]
            assert sum(scores) / len(scores) == pytest.approx(
                line["eval/score"], rel=1e-5, abs=1e-6
            )


@pytest.mark.parametrize(
    "which, passes",
    [
        pytest.param(ALL_EPOCHS, 4, id="all", marks=pytest.mark.cases(ALL_EPOCHS)),
        pytest.param(ONE_EPOCH, 1, id="target_kl", marks=pytest.mark.cases(ONE_EPOCH)),
    ],
)
def test_updates_and_passes_are_counted(which, passes, launches, stock):
    """--target_kl ends the updates after the first pass: its second update is the first with a KL
    above 0.
    """
    outcome = launches[which]
    updates = 2 * passes
    lines = outcome.metrics()[1:]
    for role in ("actor", "critic"):
        # The rate falls to 0 over the 16 planned updates, and so shows how many were taken.
        assert [line[f"lr/{role}"] for line in lines] == pytest.approx(
            [RATE, RATE * (1 - updates / 16)]
        )
    assert all(
        line["policy/micro_batches"] == line["value/micro_batches"] == updates for line in lines
    )
    actor = sum(p.numel() for p in load_plainly(stock / "sft" / "llama").parameters())
    critic = sum(
        p.numel() for p in load_plainly(stock / "reward" / "llama", reward=True).parameters()
    )
    per_token = 2 * (3 * actor + 2 * critic) + passes * 6 * (actor + critic)
    for line in lines:
        assert line["perf/tflops"] * 1e12 * RANKS / line["perf/tokens_per_s"] == pytest.approx(
            per_token
        )
    check_pipeline_tags(outcome, lines, updates)


def check_pipeline_tags(outcome: Outcome, lines: list[dict], updates: int) -> None:
    (folder,) = {
        path.parent
        for path in (outcome.out / "events" / "step3_tensorboard_logs").rglob("events.out.*")
    }
    events = EventAccumulator(str(folder)).Reload()
    expected = {
        "reward": [line["objective/score"] for line in lines],
        "actor_loss": [line["policy/loss"] for line in lines],
        "actor_loss_sum": [updates * line["policy/loss"] for line in lines],
        "critic_loss": [line["value/loss"] for line in lines],
        "critic_loss_sum": [updates * line["value/loss"] for line in lines],
    }
    for tag, values in expected.items():
        assert all(values) and len(set(values)) == 2, tag
        assert [line[tag] for line in lines] == pytest.approx(values, rel=1e-12), tag
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in enumerate(values, 1)
        ], tag
    assert set(events.Tags()["scalars"]) == {
        name for line in outcome.metrics() for name in line
    } - {"step"}


@pytest.mark.cases(SAMPLED)
def test_temperature_min_answer_len_and_penalties_take_effect(launches):
    lines = launches[SAMPLED].metrics()
    first = lines[1]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6)
    # The hybrid engine's logprobs are those of the temperature that it sampled at.
    assert all(line["rollout/logprob_gap"] < 1e-5 for line in lines[1:])
    # At least four tokens precede an end token, so every answer has five.
    assert lines[0]["eval/length"] < 5
    assert all(
        line["response/length_mean"] == line["response/length_max"] == 5 for line in lines[1:]
    )
    assert 0 < first["response/eos_rate"] < 1
    # Equal scores are not divided, and the penalty is larger than their bound.
    assert first["objective/score"] == 0.25
    scores = [0.25 - 3 * (1 - line["response/eos_rate"]) for line in lines[1:]]
    assert first["objective/reward"] == pytest.approx(scores[0], abs=1e-5)
    # k3 is never below 0, and not the log ratio that objective/kl sums whatever is asked for.
    penalty = scores[1] - lines[2]["objective/reward"]
    assert penalty > 1e-3 and penalty != pytest.approx(0.1 * lines[2]["objective/kl"], rel=0.01)


@pytest.mark.cases(SAMPLED)
def test_the_first_update_on_a_rollout_has_ratio_1_and_raw_advantages(launches):
    for line in launches[SAMPLED].metrics()[1:]:
        assert (
            line["policy/ratio_max"] == pytest.approx(1, abs=1e-5) and line["policy/clipfrac"] == 0
        )
        assert line["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
        assert line["policy/loss"] == pytest.approx(-line["advantage/mean"], rel=1e-4)
        assert abs(line["advantage/mean"]) > 0.1, "whitening would make it 0"


@pytest.mark.cases(SAMPLINGS)
def test_sampling_with_top_k_1_is_greedy(launches):
    greedy, *narrow, plain = launches[SAMPLINGS].value
    assert all(found == greedy for found in narrow)
    assert plain != greedy and len({token for row in greedy for token in row}) > 8


@pytest.mark.cases(WARMUP, FUNCTION, BOTH)
def test_several_rewards_are_summed_with_their_weights(launches, stock):
    # All three runs answer the same prompts with the same model and the same draws.
    model, function, both = (evaluation(launches[case], 0) for case in (WARMUP, FUNCTION, BOTH))
    assert (
        [row["answer"] for row in model]
        == [row["answer"] for row in function]
        == [row["answer"] for row in both]
    )
    by_hand = reward(stock, "vowels")([], [row["answer"] for row in function])
    assert [row["score"] for row in function] == by_hand and len(set(by_hand)) > 1
    sums = [WEIGHTS[0] * a["score"] + WEIGHTS[1] * b["score"] for a, b in zip(model, function)]
    assert [row["score"] for row in both] == pytest.approx(sums, rel=1e-4, abs=1e-5)


@pytest.mark.cases(BOTH)
def test_scores_are_divided_by_their_deviation_before_training(launches):
    outcome = launches[BOTH]
    scores = torch.tensor([row["score"] for row in evaluation(outcome, 0)])
    score_std = json.loads((outcome.out / "run.json").read_text())["score_std"]
    assert score_std == pytest.approx(scores.std().item(), rel=1e-5) and abs(score_std - 1) > 0.1
    first = outcome.metrics()[1]
    assert first["objective/score_clipped_frac"] == 0 and first["objective/score"] != 0
    assert first["objective/reward"] == pytest.approx(
        first["objective/score"] / score_std, abs=1e-5
    )


@pytest.mark.cases(BOTH, GROUPS)
def test_the_adapters_of_actor_and_critic_have_separate_learning_rates(launches):
    first = launches[BOTH].metrics()[1]
    assert {role: first[f"lr/{role}"] for role in LORA_RATES} == LORA_RATES
    assert launches[GROUPS].value == {"actor": [1e-3, 3e-3], "critic": [2e-3, 7e-3]}
