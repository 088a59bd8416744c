"""The split of a batch and the ZeRO stage change where numbers are computed, not the numbers."""

import pytest
from launches import Case
from options import DTYPES, MODELS, NAMES, SHARES, ZERO

# Processes, rows of each in a micro-batch, and micro-batches: always 8 rows a step.
LAYOUTS = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "1x4x2": (1, 4, 2)}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 1e-3}


def step_case(step: int | str, layout: str, zero: str, dtype: str = "fp32", more: str = "") -> Case:
    ranks, rows, accumulation = LAYOUTS[layout]
    words = (
        f"--model_name_or_path {MODELS[step]}llama --data_path {{stock}}/toy "
        f"--data_split {SHARES[step]}",
        f"--max_seq_len 48 --max_train_steps 4 --learning_rate 1e-3 {DTYPES[dtype]} {ZERO[zero]}",
        f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}",
        more,
    )
    name = f"same-{NAMES[step]}-{layout}-{zero}-{dtype}" + "-".join(more.split("--"))
    return Case(name.replace(" ", "-"), ranks=ranks, step=step, argv=" ".join(words))


def equal_runs(cases: list[Case], id: str):
    return pytest.param(cases, marks=pytest.mark.cases(*cases), id=id)


BY_LAYOUT = [
    equal_runs(
        [step_case(step, layout, zero) for zero in ("0", "2", "3") for layout in LAYOUTS],
        NAMES[step],
    )
    for step in (1, 2)
] + [
    equal_runs(
        [step_case("dpo", layout, zero) for zero in ("0", "3") for layout in LAYOUTS], "dpo"
    ),
    equal_runs([step_case(1, *case, more="--packing") for case in zip(LAYOUTS, "023")], "packing"),
    *(
        equal_runs(
            [step_case(step, *case, more="--packing") for case in (("1x8", "0"), ("2x4", zero))],
            f"{NAMES[step]}-packing",
        )
        for step, zero in ((2, "3"), ("dpo", "2"))
    ),
    *(
        equal_runs(
            [step_case(step, "1x8", "0")]
            + [step_case(step, *case, more="--tokens_per_batch 96") for case in grouped],
            f"{NAMES[step]}-tokens-per-batch",
        )
        for step, grouped in (
            (1, [("1x4x2", "0"), ("2x4", "2")]),
            (2, [("1x8", "2"), ("2x4", "3")]),
            ("dpo", [("2x4", "0")]),
        )
    ),
]
BY_STAGE = [
    equal_runs([step_case(1, "2x4", zero, dtype) for zero in ZERO], dtype)
    for dtype in ("fp32", "bf16", "fp16")
]


def losses(launches, case: Case) -> list[float]:
    return launches[case].per_step("train/loss") + launches[case].per_step("eval/loss")


@pytest.mark.parametrize("cases", BY_LAYOUT)
def test_ranks_and_accumulation_split_an_update_without_changing_it(cases, launches):
    expected = losses(launches, cases[0])
    assert len(expected) == 6 and expected[3] < expected[0]
    for case in cases[1:]:
        assert losses(launches, case) == pytest.approx(expected, rel=1e-5), case.name


@pytest.mark.parametrize("cases", BY_STAGE)
def test_every_zero_stage_takes_the_same_steps(cases, launches, request):
    expected = losses(launches, cases[0])
    tolerance = TOLERANCE[request.node.callspec.id]
    for case in cases[1:]:
        assert losses(launches, case) == pytest.approx(expected, rel=tolerance), case.name
    norms = [launches[case].per_step("train/grad_norm") for case in cases]
    for norm in norms[1:]:
        assert norm == pytest.approx(norms[0], rel=10 * tolerance)


@pytest.mark.cases(*(step_case(1, "2x4", "0", dtype) for dtype in DTYPES))
def test_half_precision_follows_full_precision(launches):
    """A wrong loss scale or bias correction shows in the first steps, far above rounding."""
    full = launches[step_case(1, "2x4", "0")].per_step("train/loss")
    for dtype in ("bf16", "fp16"):
        half = launches[step_case(1, "2x4", "0", dtype)].per_step("train/loss")
        assert half == pytest.approx(full, rel=TOLERANCE[dtype]), dtype
