"""Flags of the objective: bad values, and combinations that make no sense."""

import pytest

from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig

MODELS = "--actor_model_name_or_path a --critic_model_name_or_path c"
GROUPS = "--advantage_estimator grpo --num_samples_per_prompt 4"
# Flags of an otherwise good run, and a part of each line that reports them.
REFUSED = [
    ("--cliprange_high 0", ["--cliprange_high 0.0: must be above 0."]),
    ("--cliprange_high 0.1", ["--cliprange_high 0.1 is below --cliprange 0.2"]),
    ("--dual_clip 1", ["--dual_clip 1.0: must be above 1."]),
    ("--dual_clip 1.1", ["--dual_clip 1.1 must be above 1 + --cliprange 0.2"]),
    ("--dual_clip 3 --cispo", ["--dual_clip bounds the clipped loss, which --cispo replaces"]),
    ("--kl_in loss", ["--kl_in loss with --kl_estimator k1"]),
    ("--kl_in loss --kl_estimator k3 --kl_coef 0", ["--kl_in loss with --kl_coef 0"]),
    ("--advantage_scale batch", ["--advantage_scale batch scales rewards of answers to one"]),
    (
        "--advantage_estimator reinforce_baseline --num_samples_per_prompt 2 "
        "--advantage_scale batch",
        ["--advantage_scale batch changes nothing before --whiten_advantages"],
    ),
    (f"{GROUPS} --critic_lam 1", ["--critic_lam needs a critic"]),
    (f"{GROUPS} --lam_alpha 0.05", ["--lam_alpha needs a critic"]),
    ("--critic_lam 1.1", ["--critic_lam 1.1: must be between 0.0 and 1.0."]),
    ("--lam_alpha 0", ["--lam_alpha 0.0: must be above 0."]),
    ("--overlong_buffer 300", ["--overlong_buffer 300 is more than --max_answer_seq_len 256"]),
    ("--overlong_buffer -1", ["--overlong_buffer -1: must be at least 0."]),
    ("--overlong_penalty -1", ["--overlong_penalty -1.0: must be at least 0."]),
    ("--mask_truncated --overlong_buffer 64", ["--mask_truncated leaves out the answers that"]),
    ("--mask_truncated --missing_eos_penalty 1", ["--mask_truncated leaves out the answers that"]),
    ("--importance_correction mask", ["--importance_correction mask needs --enable_hybrid_engine"]),
    ("--dynamic_sampling", ["--dynamic_sampling compares answers to one prompt"]),
    ("--max_extra_rollouts 0", ["--max_extra_rollouts 0: must be at least 1."]),
    ("--importance_cap 1", ["--importance_cap 1.0: must be above 1."]),
]
ACCEPTED = [
    "--cliprange_high 0.28 --dual_clip 3 --loss_aggregation constant",
    "--cliprange 1 --cliprange_high 4 --cispo",
    f"{GROUPS} --ratio_level sequence --cliprange 3e-4 --cliprange_high 4e-4",
    f"{GROUPS} --advantage_scale none --kl_coef 0 --overlong_buffer 64",
    "--kl_in loss --kl_estimator k2",
    "--critic_lam 1 --lam_alpha 0.05 --critic_warmup_steps 4",
    "--importance_correction truncate --importance_level sequence --enable_hybrid_engine",
    "--advantage_estimator reinforce_baseline --num_samples_per_prompt 2 --advantage_scale batch "
    "--no_whiten_advantages",
]


@pytest.mark.parametrize("flags,expected", REFUSED)
def test_senseless_flags_are_refused_by_name(flags, expected):
    with pytest.raises(ValueError) as caught:
        parse_config(PPOConfig, f"{MODELS} {flags}".split())
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected))


@pytest.mark.parametrize("flags", ACCEPTED)
def test_combinations_of_papers_are_accepted(flags):
    parse_config(PPOConfig, f"{MODELS} {flags}".split())


def test_without_a_penalty_there_is_no_reference():
    lora = "--actor_lora_dim 8 --only_optimize_lora"
    config = parse_config(PPOConfig, f"{MODELS} {lora} --kl_coef 0".split())
    assert not config.has_reference and not config.shares_reference
    config = parse_config(PPOConfig, f"{MODELS} {lora}".split())
    assert config.has_reference and config.shares_reference
