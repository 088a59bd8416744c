"""Step 3 by its main, over ZeRO stages of both models, precisions, families and kinds of update."""

import json
import math

import pytest
from launches import Case
from options import DTYPES, case_name, case_params
from outputs import check_model_folder, load_plainly

ROLLOUTS = 2
NUM_PROMPTS = 8  # held out
ZERO = {
    "0": "--actor_zero_stage 0 --critic_zero_stage 0",
    "1-3": "--actor_zero_stage 1 --critic_zero_stage 3",
    "2-0": "--actor_zero_stage 2 --critic_zero_stage 0",
    "2-offload": "--actor_zero_stage 2 --critic_zero_stage 2 --offload",
    "3-offload": "--actor_zero_stage 3 --critic_zero_stage 1 --offload --offload_reference_model",
    "3": "--actor_zero_stage 3 --critic_zero_stage 2",
}
ADAPTERS = " ".join(
    f"--{role}_lora_dim 4 --{role}_lora_alpha 16 --{role}_lora_learning_rate 1e-2"
    for role in ("actor", "critic")
)
LORA = {"": "", "lora": ADAPTERS, "only-lora": f"{ADAPTERS} --only_optimize_lora"}
# How a rollout of 4 or 8 rows per process becomes optimizer steps.
UPDATES = {
    "one-step": "--per_device_training_batch_size 4",
    "two-steps": "--per_device_training_batch_size 2",
    "accumulation": "--per_device_training_batch_size 2 --gradient_accumulation_steps 2",
    "two-epochs": "--per_device_training_batch_size 4 --generation_batches 2 --ppo_epochs 2",
}
SWITCHES = {
    "checkpointing": "--actor_gradient_checkpointing --critic_gradient_checkpointing",
    "eot": "--add_eot_token",
    "tensorboard": "--enable_tensorboard --tensorboard_path {out}/events",
    "ema": "--enable_ema",
    "ptx": "--unsupervised_dataset_name {stock}/texts.jsonl",
}
AXES = {
    "zero": tuple(ZERO),
    "family": ("llama", "opt", "gpt2", "gpt_neox", "qwen2", "mistral"),
    "dtype": tuple(DTYPES),
    "lora": tuple(LORA),
    "updates": tuple(UPDATES),
    "ranks": (1, 2),
    **dict.fromkeys(SWITCHES, (False, True)),
}
MINOR = ("eot", "tensorboard", "ema", "ptx")
EVALUATED = {"eval/score", "eval/score_sd", "eval/kl", "eval/length", "eval/eos_rate"}
REPORTED = {
    *(
        "objective/score",
        "objective/kl",
        "objective/entropy",
        "policy/loss",
        "policy/clipfrac",
        "policy/approx_kl",
    ),
    *(
        "policy/ratio_max",
        "value/loss",
        "value/clipfrac",
        "value/explained_variance",
        "advantage/std",
    ),
    *(
        "response/length_mean",
        "response/eos_rate",
        "grad_norm/actor",
        "grad_norm/critic",
        "lr/actor",
        "lr/critic",
    ),
    *("time/generate_s", "time/score_s", "time/train_s", "perf/tokens_per_s", "perf/tflops"),
    "perf/mem_gib",
}


def start_models(options: dict) -> tuple[str, str]:
    """Return the folders of actor and critic in the stock."""
    kind = "-eot" if options["eot"] else ""
    return f"sft{kind}/{options['family']}", f"reward{kind}/{options['family']}"


def ppo_case(options: dict) -> Case:
    sft, reward = start_models(options)
    words = [
        f"--actor_model_name_or_path {{stock}}/{sft} --critic_model_name_or_path "
        f"{{stock}}/{reward}",
        "--data_path {stock}/toy --data_split 0,0,1 --max_prompt_seq_len 24 --max_answer_seq_len 6",
        "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 --num_warmup_steps 0",
        f"--per_device_generation_batch_size 4 --max_train_steps {ROLLOUTS} "
        f"--eval_prompts {NUM_PROMPTS}",
        DTYPES[options["dtype"]],
        ZERO[options["zero"]],
        LORA[options["lora"]],
        UPDATES[options["updates"]],
        *(words for name, words in SWITCHES.items() if options[name]),
    ]
    return Case(case_name("ppo", options), ranks=options["ranks"], step=3, argv=" ".join(words))


@pytest.mark.parametrize(
    "options, case", case_params(ppo_case, AXES, turns=("family",), minor=MINOR)
)
def test_ppo_leaves_complete_trained_models(options, case, launches, stock):
    outcome = launches[case]
    sft, reward = start_models(options)
    folders = {"actor", "critic"} | ({"actor_ema"} if options["ema"] else set())
    assert {
        path.name for path in outcome.out.iterdir() if (path / "config.json").exists()
    } == folders
    check_model_folder(outcome.out / "actor", start=stock / sft, reward=False, options=options)
    check_model_folder(outcome.out / "critic", start=stock / reward, reward=True, options=options)
    if options["ema"]:
        load_plainly(outcome.out / "actor_ema")
    check_metrics(outcome.metrics(), options)
    check_evaluations(outcome)
    events = {path.parent.name for path in (outcome.out / "events").rglob("events.out.*")}
    wanted = {"step3_tensorboard_logs", "step3_actor_tensorboard", "step3_critic_tensorboard"}
    assert events == (wanted if options["tensorboard"] else set())


def check_metrics(lines: list[dict], options: dict) -> None:
    assert [line["step"] for line in lines] == list(range(ROLLOUTS + 1))
    assert set(lines[0]) >= EVALUATED and set(lines[-1]) >= EVALUATED
    wanted = REPORTED | ({"ptx/loss"} if options["ptx"] else set())
    assert all(wanted <= set(line) for line in lines[1:])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    # Before the first update policy and reference are equal, so the exact KL is 0.
    first = lines[1]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6) and lines[0][
        "eval/kl"
    ] == pytest.approx(0, abs=1e-6)
    if options["updates"] in ("one-step", "accumulation"):
        tolerance = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-3}[options["dtype"]]
        assert first["policy/ratio_max"] == pytest.approx(1, abs=tolerance)
        assert first["policy/clipfrac"] == 0 or options["dtype"] != "fp32"
    else:
        assert first["policy/ratio_max"] != 1
    assert lines[2]["objective/kl"] != 0 and lines[2]["eval/kl"] > 0


def check_evaluations(outcome) -> None:
    files = sorted((outcome.out / "evaluation").iterdir())
    assert [file.name for file in files] == [
        "rollout_000000.jsonl",
        f"rollout_{ROLLOUTS:06d}.jsonl",
    ]
    for file, line in zip(files, (outcome.metrics()[0], outcome.metrics()[-1])):
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        assert len(rows) == NUM_PROMPTS
        assert len({row["prompt"] for row in rows}) > 4
        assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(
            line["eval/score"], rel=1e-5, abs=1e-6
        )
        assert sum(row["length"] for row in rows) / len(rows) == pytest.approx(line["eval/length"])
