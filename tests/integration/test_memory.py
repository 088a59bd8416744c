"""Memory savings must not change numbers: shared models, int8 weights, states on the host."""

import pytest
import torch
from launches import Case, failing
from outputs import check_model_folder, load_plainly


def check_case(name: str, function: str, *, ranks: int = 2, **kwargs):
    case = Case(
        name,
        ranks=ranks,
        function=f"memory_checks.py:{function}",
        kwargs={"stock": "{stock}", **kwargs},
    )
    return pytest.param(case, id=name, marks=pytest.mark.cases(case))


def run_case(name: str, argv: str, *, family: str = "llama", ranks: int = 2) -> Case:
    """Return step 3 on toy data, in fp32 unless `argv` says otherwise."""
    words = (
        f"--actor_model_name_or_path {{stock}}/sft/{family} "
        f"--critic_model_name_or_path {{stock}}/reward/{family} "
        "--data_path {stock}/toy --data_split 0,0,1 --max_prompt_seq_len 24 "
        "--max_answer_seq_len 6 --dtype fp32 "
        "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3 --num_warmup_steps 0 "
        "--max_train_steps 3 "
        "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --eval_prompts 8"
    )
    return Case(name, ranks=ranks, step=3, argv=f"{words} {argv}")


ADAPTERS = " ".join(
    f"--{role}_lora_dim 4 --{role}_lora_alpha 16 --{role}_lora_learning_rate 1e-2"
    for role in ("actor", "critic")
)
ZERO = {
    "0": "--actor_zero_stage 0 --critic_zero_stage 0",
    "2": "--actor_zero_stage 2 --critic_zero_stage 2",
    "2-offload": "--actor_zero_stage 2 --critic_zero_stage 2 --offload",
    "3": "--actor_zero_stage 3 --critic_zero_stage 3 --deepspeed_config {stock}/pieces.json",
}


SHARED = [
    check_case("shared-0-llama", "shared_reference", family="llama", zero=0, dtype="fp32"),
    check_case("shared-2-opt", "shared_reference", family="opt", zero=2, dtype="bf16"),
    check_case("shared-3-llama", "shared_reference", family="llama", zero=3, dtype="fp32"),
    check_case(
        "shared-3-gpt2-offload",
        "shared_reference",
        family="gpt2",
        zero=3,
        dtype="bf16",
        offload=True,
    ),
]


@pytest.mark.parametrize("case", SHARED)
def test_the_actor_without_adapters_is_the_reference(case, launches):
    assert failing(launches, case) == []


def quantised_case(
    zero: int,
    family: str,
    dtype: str,
    *,
    ranks: int = 2,
    checkpointing: bool = False,
    offload: bool = False,
):
    more = "-checkpointing" if checkpointing else ""
    more += "-offload" if offload else ""
    return check_case(
        f"int8-{zero}-{family}-{dtype}-x{ranks}{more}",
        "quantised_training",
        ranks=ranks,
        family=family,
        zero=zero,
        dtype=dtype,
        checkpointing=checkpointing,
        offload=offload,
    )


QUANTISED = [
    quantised_case(0, "llama", "fp32", ranks=1),
    quantised_case(2, "opt", "bf16", checkpointing=True),
    quantised_case(3, "llama", "fp32"),
    quantised_case(3, "llama", "fp32", ranks=1, checkpointing=True),
    quantised_case(3, "opt", "bf16", checkpointing=True),
    quantised_case(3, "gpt2", "fp32"),
    quantised_case(3, "llama", "fp16"),
    quantised_case(3, "llama", "bf16", offload=True),
]


@pytest.mark.parametrize("case", QUANTISED)
def test_int8_layers_train_adapters_as_dense_layers_of_the_same_values_do(case, launches):
    assert failing(launches, case) == []


MEMORY = {
    zero: Case(
        f"frozen-{zero}",
        ranks=2,
        function="memory_checks.py:frozen_memory",
        kwargs={"stock": "{stock}", "zero": zero},
    )
    for zero in (2, 3)
}


@pytest.mark.cases(*MEMORY.values())
def test_frozen_weights_shrink(launches):
    for zero, case in MEMORY.items():
        sizes = launches[case].value
        assert sizes["held False"] > 1.6 * sizes["held True"], zero
        assert sizes["left"] == 0, zero
    whole, partitioned = (launches[case].value for case in MEMORY.values())
    assert partitioned["held True"] == whole["held True"] / 2


IDLE = [
    check_case(f"idle-{zero}-{dtype}", "idle_states", zero=zero, dtype=dtype)
    for zero, dtype in ((0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "bf16"), (3, "fp32"))
] + [check_case("idle-3-bf16-offload", "idle_states", zero=3, dtype="bf16", offload=True)]


@pytest.mark.parametrize("case", IDLE)
def test_states_moved_to_the_host_come_back_unchanged(case, launches):
    assert failing(launches, case) == []


GPU_IDLE = {
    zero: check_case(f"gpu-idle-{zero}", "idle_memory", ranks=1, zero=zero) for zero in (1, 2, 3)
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_IDLE.values())
def test_idle_states_leave_the_gpu(case, launches):
    sizes = launches[case].value
    # Two moments and the master weights, 4 bytes each.
    assert sizes["there"] - sizes["away"] >= 12 * sizes["trained"]
    assert sizes["back"] == pytest.approx(sizes["there"], rel=0.05)


def numbers(launches, case: Case) -> list[dict]:
    """Return the metrics of a run, without times and memory."""
    lines = launches[case].metrics()
    numbers = [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines
    ]
    # In fp32 without ZeRO DeepSpeed reports no gradient norm.
    return [{k: v for k, v in line.items() if v is not None} for line in numbers]


def same_runs(launches, one: Case, other: Case) -> None:
    found, expected = numbers(launches, one), numbers(launches, other)
    assert len(found) == len(expected) == 4 and found[-1]["objective/kl"] != 0
    for mine, theirs in zip(found, expected):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def shared_pair(zero: str, family: str):
    argv = f"{ADAPTERS} --only_optimize_lora {ZERO[zero]}"
    shared = run_case(f"share-{zero}-{family}", argv, family=family)
    apart = run_case(
        f"apart-{zero}-{family}", f"{argv} --no_share_reference --no_share_reward", family=family
    )
    return pytest.param(
        shared, apart, id=f"{zero}-{family}", marks=pytest.mark.cases(shared, apart)
    )


PAIRS = [shared_pair("0", "gpt2"), shared_pair("2-offload", "llama"), shared_pair("3", "opt")]


@pytest.mark.parametrize("shared, apart", PAIRS)
def test_shared_models_train_as_copies_do(shared, apart, launches):
    same_runs(launches, shared, apart)


HOST = "--offload_reference_model --offload_reward_model"
HOSTED = {
    zero: (run_case(f"host-{zero}", f"{argv} {HOST}"), run_case(f"no-host-{zero}", argv))
    for zero, argv in ZERO.items()
    if zero != "2"
}


@pytest.mark.parametrize(
    "hosted, plain",
    [pytest.param(*pair, id=zero, marks=pytest.mark.cases(*pair)) for zero, pair in HOSTED.items()],
)
def test_reference_and_reward_answer_the_same_from_host_memory_at_every_stage(
    hosted, plain, launches
):
    same_runs(launches, hosted, plain)


def travelling_pair(zero: str):
    argv = f"{ZERO[zero]} --enable_ema --eval_interval 2"
    stayed = run_case(f"stayed-{zero}", argv)
    away = {"argv": f"{stayed.argv} --offload_idle_states", "out": "{out}"}
    away = Case(
        f"away-{zero}", ranks=2, function="memory_checks.py:run_with_travelling_states", kwargs=away
    )
    return pytest.param(away, stayed, id=zero, marks=pytest.mark.cases(away, stayed))


@pytest.mark.parametrize("away, stayed", [travelling_pair("2"), travelling_pair("3")])
def test_moving_idle_states_changes_no_metric(away, stayed, launches):
    same_runs(launches, away, stayed)
    ema = [load_plainly(launches[case].out / "actor_ema").state_dict() for case in (away, stayed)]
    assert all(torch.equal(tensor, ema[1][name]) for name, tensor in ema[0].items())


# The two runs draw a few tokens differently; with only eight answers that could be a fifth of a
# mean.
MANY = "--per_device_generation_batch_size 32"
MIXED = {
    "shared": run_case(
        "mixed-shared",
        f"{ADAPTERS} --only_optimize_lora --enable_mixed_precision_lora "
        f"--enable_ema {ZERO['3']} {MANY}",
    ),
    "copies": run_case("nf4-copies", f"{ADAPTERS} --quantize_frozen nf4 {ZERO['3']}", ranks=1),
    "plain": run_case("not-mixed", f"{ADAPTERS} --only_optimize_lora {ZERO['3']} {MANY}"),
}


@pytest.mark.cases(*MIXED.values())
def test_quantized_runs_begin_at_their_reference_and_stay_near_unquantised_ones(launches, stock):
    for name in ("shared", "copies"):
        lines = launches[MIXED[name]].metrics()
        assert [lines[0]["eval/kl"], lines[1]["objective/kl"]] == pytest.approx([0, 0], abs=1e-6)
        assert lines[-1]["eval/kl"] > 0
        for role, start, reward in (("actor", "sft", False), ("critic", "reward", True)):
            options = {
                "dtype": "fp32",
                "lora": "only-lora" if name == "shared" else "lora",
                "eot": False,
            }
            folder = launches[MIXED[name]].out / role
            check_model_folder(
                folder, start=stock / start / "llama", reward=reward, options=options
            )
            assert (folder / "adapter").exists() == (name == "shared")
    load_plainly(launches[MIXED["shared"]].out / "actor_ema")
    mixed, plain = (launches[MIXED[name]].metrics()[1] for name in ("shared", "plain"))
    for key in ("objective/entropy", "value/mean", "value/loss"):
        assert mixed[key] != plain[key] and mixed[key] == pytest.approx(plain[key], rel=0.05), key


def supervised_quantized(step: int, ranks: int, stored: str):
    kind, share = {1: ("base", "1,0,0"), 2: ("sft", "0,1,0")}[step]
    argv = (
        f"--model_name_or_path {{stock}}/{kind}/llama --data_path {{stock}}/toy "
        f"--data_split {share} --max_seq_len 48 "
        "--max_train_steps 12 --lora_dim 4 --lora_alpha 16 --lora_learning_rate 1e-2 "
        "--only_optimize_lora --dtype fp32 "
        f"--quantize_frozen {stored} --zero_stage 3 --deepspeed_config {{stock}}/pieces.json "
        "--per_device_train_batch_size 8 --per_device_eval_batch_size 4"
    )
    case = Case(f"{stored}-step{step}-x{ranks}", ranks=ranks, step=step, argv=argv)
    return pytest.param(case, kind, id=case.name, marks=pytest.mark.cases(case))


@pytest.mark.parametrize(
    "case, kind",
    [
        supervised_quantized(1, 1, "nf4"),
        supervised_quantized(1, 2, "int8"),
        supervised_quantized(2, 2, "nf4"),
    ],
)
def test_steps_1_and_2_train_adapters_on_quantized_weights(case, kind, launches, stock):
    outcome = launches[case]
    options = {"dtype": "fp32", "lora": "only-lora", "eot": False}
    check_model_folder(
        outcome.out, start=stock / kind / "llama", reward=case.step == 2, options=options
    )
    assert (outcome.out / "adapter" / "adapter_model.safetensors").exists()
    losses = outcome.per_step("eval/loss")
    assert losses[-1] < losses[0]


def greedy_pair(name: str, zero: str, more: str = "", *, stored: str = "int8"):
    argv = f"{ADAPTERS} --only_optimize_lora --quantize_frozen {stored} {ZERO[zero]}"
    argv += " --greedy_rollouts --no_normalize_reward --add_eot_token"  # a new token, trained
    plain = run_case(f"{stored}-plain-{zero}", argv)
    hybrid = run_case(f"{stored}-hybrid-{zero}-{name}", f"{argv} --enable_hybrid_engine {more}")
    return pytest.param(plain, hybrid, id=name, marks=pytest.mark.cases(plain, hybrid))


@pytest.mark.parametrize(
    "plain, hybrid",
    [
        greedy_pair("attached", "2-offload", "--hybrid_lora attach", stored="nf4"),
        greedy_pair("gathered", "3"),
        greedy_pair("split", "3", "--inference_tp_size 2"),
    ],
)
def test_the_hybrid_engine_generates_with_quantized_weights_as_the_training_module_does(
    plain, hybrid, launches
):
    found, expected = numbers(launches, hybrid)[1:], numbers(launches, plain)[1:]
    assert len(found) == 3 and expected[-1]["objective/kl"] != 0
    for mine, theirs in zip(found, expected):
        keys = [key for key in theirs if not key.startswith("eval/")]  # which is sampled
        assert {key: mine[key] for key in keys} == pytest.approx(
            {key: theirs[key] for key in keys}, rel=1e-4, abs=1e-5
        )


IN_PIECES = check_case("adapter-in-pieces", "adapter_in_pieces", out="{out}")


@pytest.mark.parametrize("case", [check_case("finite-in-pieces", "finite_in_pieces")])
def test_padding_of_partitioned_weights_is_ignored(case, launches):
    assert failing(launches, case) == []


@pytest.mark.parametrize("case", [IN_PIECES])
def test_an_adapter_is_merged_into_partitioned_weights(case, launches):
    assert failing(launches, case) == []


GPU_INT8 = {
    zero: check_case(f"gpu-int8-{zero}", "int8_memory", ranks=1, zero=zero, out="{out}")
    for zero in (2, 3)
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_INT8.values())
def test_int8_weights_free_memory_of_the_gpu_and_losses_stay(case, launches):
    dense, mixed = launches[case].value
    assert dense["allocated"] - mixed["allocated"] >= (1 - 1 / 1.6) * dense["frozen"]
    assert mixed["losses"] == pytest.approx(dense["losses"], rel=0.02)
    assert dense["losses"][-1] < dense["losses"][0]
