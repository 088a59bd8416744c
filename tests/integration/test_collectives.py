"""One process calls the collectives that many would, and they change nothing.

On a GPU the backend is NCCL, which takes GPU tensors only. A tensor left on the host would stop a
run on several GPUs.
"""

import pytest
from launches import Case
from test_memory import numbers

COMMON = (
    "--data_path {stock}/toy --dtype fp32 --max_train_steps 2 --save_interval 1 "
    "--learning_rate 1e-2"
)
ARGV = {
    1: (
        f"--model_name_or_path {{stock}}/base/llama --data_split 1,0,0 --max_seq_len 48 "
        f"--zero_stage 2 {COMMON}"
    ),
    2: (
        f"--model_name_or_path {{stock}}/sft/llama --data_split 0,1,0 --max_seq_len 48 "
        f"--zero_stage 3 {COMMON}"
    ),
    "dpo": (
        f"--model_name_or_path {{stock}}/sft/llama --data_split 0,1,0 --max_seq_len 48 "
        f"--zero_stage 1 {COMMON}"
    ),
}
PPO = (
    "--actor_model_name_or_path {stock}/sft/llama --critic_model_name_or_path "
    "{stock}/reward/llama --data_path {stock}/toy "
    "--data_split 0,0,1 --max_prompt_seq_len 24 --max_answer_seq_len 6 --dtype fp32 "
    "--max_train_steps 2 --eval_prompts 8 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 2 "
    "--enable_hybrid_engine --enable_ema "
    "--save_interval 1 --print_answers --whiten_advantages --num_warmup_steps 0"
)
ARGV |= {
    f"3-{stage}": f"{PPO} --actor_zero_stage {stage} --critic_zero_stage {stage}"
    f"{' --offload' * (stage == 2)}"
    for stage in (2, 3)
}


def step_of(name: int | str) -> int | str:
    return 3 if str(name).startswith("3-") else name


def with_peers(prefix: str, name: int | str) -> Case:
    kwargs = {"step": step_of(name), "argv": ARGV[name], "out": "{out}"}
    return Case(
        f"{prefix}-{name}", function="collective_checks.py:run_as_with_peers", kwargs=kwargs
    )


def pair(name: int | str):
    peers = with_peers("peers", name)
    alone = Case(f"alone-{name}", step=step_of(name), argv=ARGV[name])
    return pytest.param(peers, alone, id=str(name), marks=pytest.mark.cases(peers, alone))


@pytest.mark.parametrize("peers, alone", [pair(name) for name in ARGV])
def test_collectives_of_one_process_change_nothing(peers, alone, launches):
    assert launches[peers].value > 20
    found, expected = numbers(launches, peers), numbers(launches, alone)
    assert found == expected and len(found) > 2


GPU = [with_peers("gpu-peers", name) for name in ARGV]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=pytest.mark.cases(case)) for case in GPU]
)
def test_collectives_get_tensors_that_nccl_accepts(case, launches):
    assert launches[case].value > 20
