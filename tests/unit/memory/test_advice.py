"""The flags that are named for a run that does not fit: they make it fit, and no fewer would."""

import itertools

import pytest

from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.memory.advice import GIB, Machine, _kinds, enough_gpus, find_remedy, with_options
from dschat.memory.plan import plan_step
from dschat.memory.report import check_fit

CONFIGS = {"1": SFTConfig, "2": RewardConfig, "dpo": DPOConfig, "3": PPOConfig}


def configured(step: str, model: str, flags: str = ""):
    """Return the configuration of a step; the models of step 3 are "actor critic"."""
    names = f"--model_name_or_path {model}"
    if step == "3":
        names = "--actor_model_name_or_path {} --critic_model_name_or_path {}".format(
            *model.split()
        )
    return parse_config(CONFIGS[step], f"{names} {flags}".split())


def machine(gpu_gib: float, host_gib: float = 0.0, gpus: int = 1) -> Machine:
    return Machine(gpus, min(gpus, 8), gpu_gib * GIB, host_gib * GIB)


def refusal(config, on: Machine, dtype: str = "bf16") -> str:
    plan = plan_step(config, world_size=on.world_size, dtype=dtype)
    limits = dict(gpu_bytes=on.gpu_bytes, all_host_bytes=on.all_host_bytes)
    with pytest.raises(ValueError) as refused:
        check_fit(
            config, plan, world_size=on.world_size, processes=on.processes, dtype=dtype, **limits
        )
    return str(refused.value)


def fits(config, on: Machine, dtype: str = "bf16") -> bool:
    return not config.problems() and not on.missing(
        plan_step(config, world_size=on.world_size, dtype=dtype)
    )


def some_fitting(config, on: Machine, *, fewer_than: int) -> dict | None:
    """Return options of fewer flags that fit, found by trying all, or None."""
    changes = [
        change.options for kind in _kinds(config, world_size=on.world_size) for change in kind
    ]
    for count in range(1, fewer_than):
        for chosen in itertools.combinations(changes, count):
            options = {key: value for change in chosen for key, value in change.items()}
            if sum(map(len, chosen)) == len(options) < fewer_than and fits(
                with_options(config, options), on
            ):
                return options
    return None


FEW = [
    ("1", "opt-1.3b", "", (16,)),
    ("1", "opt-6.7b", "--zero_stage 2", (80,)),
    ("1", "llama-2-7b", "", (24,)),
    ("1", "llama-2-7b", "--zero_stage 3", (24, 300, 8)),
    ("1", "llama-2-13b", "--per_device_train_batch_size 4", (40, 128)),
    ("1", "opt-30b", "--zero_stage 1", (80, 500, 8)),
    ("1", "opt-66b", "--zero_stage 3", (32, 1000, 64)),
    ("2", "opt-1.3b", "", (32,)),
    ("2", "llama-2-7b", "--zero_stage 2", (48, 64)),
    ("dpo", "opt-350m", "", (16,)),
    ("dpo", "llama-2-7b", "", (80, 256)),
    ("3", "opt-1.3b opt-350m", "", (24,)),
    ("3", "opt-1.3b opt-350m", "--enable_hybrid_engine --actor_zero_stage 2", (32, 64)),
    ("3", "opt-6.7b opt-350m", "--enable_hybrid_engine", (40,)),
    ("3", "llama-2-7b opt-350m", "", (24,)),
    ("3", "llama-2-7b opt-350m", "--enable_hybrid_engine", (80, 100, 2)),
    ("3", "llama-2-7b llama-2-7b", "--actor_zero_stage 3 --critic_zero_stage 3", (40, 1000, 8)),
]


@pytest.mark.parametrize(
    "step, model, flags, sizes", FEW, ids=[" ".join(map(str, case)) for case in FEW]
)
def test_advice_names_the_fewest_flags_that_make_a_run_fit(step, model, flags, sizes):
    config = configured(step, model, flags)
    on = machine(*sizes)
    told = refusal(config, on).partition("It fits with ")[2].partition(" (")[0]
    count = told.count("--")
    assert 1 <= count <= 3, told
    assert fits(configured(step, model, f"{flags} {told}"), on)
    assert some_fitting(config, on, fewer_than=count) is None


MANY = [
    ("1", "llama-2-13b", "", (16, 64)),
    ("dpo", "llama-2-7b", "", (18, 64)),
    ("3", "llama-2-7b llama-2-7b", "", (24,)),
    ("3", "llama-2-13b opt-350m", "--enable_hybrid_engine", (32, 64)),
    ("3", "llama-2-70b opt-350m", "--enable_hybrid_engine", (80, 1000, 8)),
]


@pytest.mark.parametrize(
    "step, model, flags, sizes", MANY, ids=[" ".join(map(str, case)) for case in MANY]
)
def test_advice_says_if_three_flags_are_not_enough_and_needs_each_flag_it_names(
    step, model, flags, sizes
):
    config = configured(step, model, flags)
    on = machine(*sizes)
    message = refusal(config, on)
    told = message.partition("No 3 flags are enough. It fits with ")[2].partition(" (")[0]
    assert told, message
    assert fits(configured(step, model, f"{flags} {told}"), on)
    assert some_fitting(config, on, fewer_than=4) is None
    options = find_remedy(config, on, dtype="bf16").options
    changes = [
        change.options for kind in _kinds(config, world_size=on.world_size) for change in kind
    ]
    for change in [change for change in changes if change.items() <= options.items()]:
        rest = {key: value for key, value in options.items() if key not in change}
        assert not fits(with_options(config, rest), on), change


def test_a_smaller_batch_keeps_training_equal_and_counts_as_two_flags():
    flags = "--lora_dim 8 --only_optimize_lora --gradient_checkpointing --offload --zero_stage 3 "
    flags += "--enable_mixed_precision_lora"
    config = configured("1", "llama-2-7b", f"{flags} --per_device_train_batch_size 256")
    found = find_remedy(config, machine(24), dtype="bf16")
    assert found.flags == ["--per_device_train_batch_size 64", "--gradient_accumulation_steps 4"]


def test_host_memory_counts_and_may_be_what_is_missing():
    config = configured("3", "llama-2-7b llama-2-7b")
    on = machine(80, 100)
    found = find_remedy(config, on, dtype="bf16")
    # Offload of two whole models would need 242 GB of host memory.
    assert (
        not found.missing
        and found.plan.host_bytes(processes=1) <= 100 * GIB
        and "offload" not in found.options
    )
    message = refusal(
        configured("1", "llama-2-7b", "--lora_dim 8 --only_optimize_lora"), machine(80, 10)
    )
    assert "GiB of 10.0 GiB host memory" in message and "No flags make it fit 1 GPU(s)" in message
    assert (
        "Up to 1024 GPUs are not enough either: take a smaller model, or hosts with more memory."
        in message
    )


def test_advice_finds_ordinary_host_memory_if_page_locked_does_not_fit():
    flags = "--actor_zero_stage 2 --critic_zero_stage 2 --offload --actor_gradient_checkpointing "
    flags += "--critic_gradient_checkpointing --per_device_generation_batch_size 4 "
    flags += "--per_device_training_batch_size 4"
    config = configured("3", "opt-13b opt-350m", flags)
    # fp32 weights and gradients of 48 GiB each take 64, bf16 weights of 24 take 32.
    assert "263.3 GiB of 250.0 GiB host memory. It fits with --no_pin_memory (" in refusal(
        config, machine(80, 250)
    )
    assert not machine(80, 264).missing(plan_step(config, world_size=1, dtype="bf16"))


def test_advice_names_the_nearest_miss_and_enough_gpus_if_no_flags_help():
    models, flags = "llama-2-70b opt-350m", "--enable_hybrid_engine --critic_gradient_checkpointing"
    config = configured("3", models, flags)
    on = machine(36, 1000)
    message = refusal(config, on)
    nearest = find_remedy(config, on, dtype="bf16")
    assert nearest.missing and f"{' '.join(nearest.flags)} (" in message
    assert f"it is nearest, and {nearest.missing / GIB:.1f} GiB too large" in message
    for change in [change.options for kind in _kinds(config, world_size=1) for change in kind]:
        tried = with_options(config, nearest.options | change)
        assert (
            tried.problems()
            or on.missing(plan_step(tried, world_size=1, dtype="bf16")) >= nearest.missing
        )
    larger, found = enough_gpus(config, on, dtype="bf16")
    assert f"{larger.world_size} GPUs would do, with {' '.join(found.flags)} (" in message
    assert fits(configured("3", models, f"{flags} {' '.join(found.flags)}"), larger)
    half = Machine(
        larger.world_size // 2, min(larger.world_size // 2, 8), on.gpu_bytes, on.all_host_bytes
    )
    assert find_remedy(config, half, dtype="bf16").missing


def test_larger_tensor_parallel_groups_are_a_remedy_if_model_and_ranks_allow():
    flags = "--enable_hybrid_engine --actor_zero_stage 3 --critic_zero_stage 3 --offload "
    flags += "--actor_lora_dim 8 --critic_lora_dim 8 --only_optimize_lora "
    flags += "--actor_gradient_checkpointing --critic_gradient_checkpointing "
    flags += "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 "
    flags += "--per_device_eval_batch_size 4"
    config = configured("3", "llama-2-7b llama-2-7b", flags)
    assert find_remedy(config, machine(10, gpus=8), dtype="bf16").flags == ["--inference_tp_size 8"]
    assert "inference_tp_size" not in find_remedy(config, machine(10, gpus=3), dtype="bf16").options


def test_half_precision_is_a_remedy_for_fp32():
    config = configured(
        "1", "opt-350m", "--dtype fp32 --gradient_checkpointing --per_device_eval_batch_size 4"
    )
    plan = plan_step(config, world_size=1, dtype="fp32")
    on = Machine(1, 1, plan.peak[1] - GIB / 4, 0)
    assert {"dtype": "auto"} in [
        change.options for kind in _kinds(config, world_size=1) for change in kind
    ]
    found = find_remedy(config, on, dtype="fp32")
    assert (found.options, found.missing) == ({"dtype": "auto"}, 0)


def test_with_options_replaces_fields_in_any_group():
    config = with_options(
        configured("1", "opt-350m"),
        {"gradient_checkpointing": True, "per_device_train_batch_size": 2},
    )
    assert config.system.gradient_checkpointing and config.batch.per_device_train_batch_size == 2
    assert config.system.zero_stage == 0
