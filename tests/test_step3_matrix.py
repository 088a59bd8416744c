"""Step 3 with ZeRO 2 or 3, the Hybrid Engine, offload and LoRA: all sixteen combinations agree.

    python -m pytest tests/test_step3_matrix.py                  # a miniature OPT, 2 CPU processes
    python -m pytest tests/test_step3_matrix.py --model FOLDER   # a real model, on GPUs

In fp32, with greedy answers and unscaled scores, no logged number depends on where weights are
stored.
"""

import itertools
import math

import pytest
import torch
from launches import Case
from outputs import load_plainly
from transformers import AutoTokenizer

from dschat.data.prompt_files import read_rows

ROLLOUTS = 5
ANSWER_TOKENS = 16
RANKS = 1 if torch.cuda.device_count() == 1 else 2
COMMON = (
    "--actor_model_name_or_path {stock}/matrix/actor "
    "--critic_model_name_or_path {stock}/matrix/critic "
    f"--data_path {{stock}}/toy --data_split 0,0,1 --max_prompt_seq_len 24 "
    f"--max_answer_seq_len {ANSWER_TOKENS} "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --eval_prompts 2 "
    "--num_warmup_steps 0 "
    "--actor_learning_rate 1e-4 --critic_learning_rate 1e-4 --lr_scheduler_type constant "
    "--dtype fp32 --seed 7 "
    f"--greedy_rollouts --no_normalize_reward --enable_test_mode --test_stop_step {ROLLOUTS}"
)
HYBRID = "--enable_hybrid_engine"
OFFLOAD = "--offload --offload_reference_model --offload_reward_model"
LORA = "--only_optimize_lora " + " ".join(
    f"--{role}_lora_dim 8 --{role}_lora_alpha 16 --{role}_lora_learning_rate 1e-3 "
    f"--{role}_gradient_checkpointing"
    for role in ("actor", "critic")
)


def matrix_case(zero: int, hybrid: bool, offload: bool, lora: bool) -> Case:
    words = [COMMON, f"--actor_zero_stage {zero} --critic_zero_stage {zero}"]
    words += [flag for flag, is_on in ((HYBRID, hybrid), (OFFLOAD, offload), (LORA, lora)) if is_on]
    if zero == 3:
        words.append("--deepspeed_config {stock}/pieces.json")
    flags = [str(is_on).lower() for is_on in (hybrid, offload, lora)]
    name = "z{}_he_{}_offload_{}_lora_{}".format(zero, *flags)
    return Case(f"matrix-{name}", ranks=RANKS, step=3, argv=" ".join(words))


ON_OFF = (False, True)
CASES = {
    lora: [matrix_case(*row, lora) for row in itertools.product((2, 3), ON_OFF, ON_OFF)]
    for lora in ON_OFF
}
EACH = [
    pytest.param(case, id=case.name[7:], marks=pytest.mark.cases(case))
    for lora in ON_OFF
    for case in CASES[lora]
]


def steps(outcome) -> list[dict[str, float]]:
    """Return the metrics of each rollout, without times, memory, the sampled evaluation and metrics
    of one engine only.
    """
    kept = [line for line in outcome.metrics() if line["step"] > 0]
    left_out = ("time/", "perf/", "eval/", "rollout/")
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in kept]


@pytest.mark.parametrize("case", EACH)
def test_each_combination_trains_and_leaves_models_that_load(case, launches, stock):
    outcome = launches[case]
    lines = steps(outcome)
    assert [line["step"] for line in lines] == list(range(1, ROLLOUTS + 1))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert not any(line["policy/skipped_steps"] for line in lines)
    for role in ("actor", "critic"):
        start = load_plainly(stock / "matrix" / role, reward=role == "critic").state_dict()
        found = load_plainly(outcome.out / role, reward=role == "critic").state_dict()
        changed = [name for name in start if not torch.equal(found[name], start[name])]
        assert any("q_proj" in name for name in changed), role


BY_LORA = [
    pytest.param(lora, id=f"lora_{lora}", marks=pytest.mark.cases(*CASES[lora])) for lora in ON_OFF
]


@pytest.mark.parametrize("lora", BY_LORA)
def test_all_combinations_take_the_same_steps(lora, launches):
    first, *others = CASES[lora]
    expected = steps(launches[first])
    assert (
        expected[-1]["objective/kl"] != 0
        and expected[-1]["objective/score"] != expected[0]["objective/score"]
    )
    for case in others:
        for number, (found, wanted) in enumerate(zip(steps(launches[case]), expected, strict=True)):
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4), (case.name, number)


def test_greedy_answers_of_the_start_say_something(stock, request):
    """A model that repeats one token would hide faults of the cache."""
    if request.config.getoption("--model"):
        pytest.skip("the miniature model's answers are looked at")
    model = load_plainly(stock / "matrix" / "actor")
    tokenizer = AutoTokenizer.from_pretrained(stock / "matrix" / "actor")
    for row in list(read_rows(str(stock / "toy" / "train.jsonl"), flag="rows"))[:8]:
        ids = tokenizer(row.prompt, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert len(set(answer.tolist())) >= 8
