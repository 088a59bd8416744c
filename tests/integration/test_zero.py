"""Engines in a process group of two: steps that all take or none, and weights in pieces."""

import pytest
from launches import Case, failing


def check_case(name: str, function: str, **kwargs):
    case = Case(
        name,
        ranks=2,
        function=f"engine_checks.py:{function}",
        kwargs={"stock": "{stock}", **kwargs},
    )
    return pytest.param(case, id=name, marks=pytest.mark.cases(case))


def planted_cases():
    stages = [
        (zero, offload)
        for zero in range(4)
        for offload in ((False, True) if zero >= 2 else (False,))
    ]
    for zero, offload in stages:
        for number, dtype in enumerate(("fp32", "bf16", "fp16")):
            name = f"planted-{zero}{'-offload' if offload else ''}-{dtype}"
            options = dict(zero=zero, dtype=dtype, offload=offload)
            yield check_case(
                name,
                "planted",
                **options,
                accumulation=1,
                value=("inf", "nan")[(zero + number) % 2],
            )
            # The gradients of a window are elsewhere than those of a single micro-step.
            if dtype == "fp32" or zero == 2:
                yield check_case(f"{name}-x2", "planted", **options, accumulation=2, value="inf")


WHOLE = [
    check_case(
        f"whole-{family}-{dtype}", "whole_weights", family=family, dtype=dtype, reward=reward
    )
    for family, dtype, reward in (
        ("opt", "fp32", False),
        ("llama", "bf16", False),
        ("gpt2", "fp32", True),
    )
]
FRESH = check_case("fresh-heads", "fresh_heads")
SCALED = [check_case(f"scaled-{zero}", "scaled_head", zero=zero) for zero in (0, 3)]

REFUSED = [check_case(f"refused-{zero}", "refused_prompt", zero=zero) for zero in (0, 3)]
EXPERTS = Case(
    "expert-adapters",
    ranks=2,
    function="expert_checks.py:expert_adapters_train_alike",
    kwargs={"stock": "{stock}", "family": "gpt_oss", "out": "{out}"},
)


@pytest.mark.parametrize("case", list(planted_cases()))
def test_a_bad_gradient_stops_all_engines_on_all_ranks(case, launches):
    assert failing(launches, case) == []


@pytest.mark.parametrize("case", WHOLE)
def test_partitioned_weights_are_seen_whole(case, launches):
    assert failing(launches, case) == []


@pytest.mark.parametrize("case", [FRESH])
def test_a_new_reward_head_is_the_same_under_all_stages(case, launches):
    assert failing(launches, case) == []


@pytest.mark.parametrize("case", SCALED)
def test_a_scaled_head_scales_the_values(case, launches):
    assert failing(launches, case) == []


@pytest.mark.parametrize("case", REFUSED)
def test_a_prompt_that_one_rank_cannot_show_ends_all(case, launches):
    """Under ZeRO-3 the weights are gathered in the forward, in which both have to be."""
    said = [result["value"] for result in launches[case].ranks]
    assert (
        said[0] == "A reward failed on another rank; see its message." and "not this one" in said[1]
    )


@pytest.mark.cases(EXPERTS)
def test_adapters_of_experts_train_alike_under_all_stages(launches):
    assert failing(launches, EXPERTS) == []
