"""Invariants of a PPO update: the split of a batch, ZeRO, padding, tokens after an answer's end."""

from pathlib import Path

import pytest
import torch
from experience import EOS, reference_gradients
from launches import Case
from safetensors.torch import load_file

LAYOUTS = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "1x4x2": (1, 4, 2)}
STAGES = (0, 1, 2, 3)


def update_case(name: str, layout: str = "1x8", zero: int = 0, sgd: bool = True, **more) -> Case:
    ranks, rows, accumulation = LAYOUTS[layout]
    kwargs = dict(
        stock="{stock}",
        out="{out}",
        rows=rows,
        accumulation=accumulation,
        zero=zero,
        sgd=sgd,
        **more,
    )
    return Case(f"update-{name}", ranks=ranks, function="ppo_checks.py:update", kwargs=kwargs)


SPLITS = {
    sgd: [
        update_case(f"{'sgd' if sgd else 'adam'}-{layout}-{zero}", layout, zero, sgd)
        for layout in LAYOUTS
        for zero in STAGES
    ]
    for sgd in (True, False)
}
# With 36 tokens the ranks, too, differ in the micro-batches that they need.
SPLITS[True] += [
    update_case(f"grouped-{layout}-{zero}", layout, zero, tokens=36)
    for layout, zero in (("1x4x2", 0), ("1x8", 2), ("2x4", 3))
]
PTX = [
    update_case(f"ptx-{layout}-{zero}", layout, zero, with_ptx=True)
    for layout in ("1x8", "1x4x2")
    for zero in STAGES
] + [update_case("ptx-grouped", "1x4x2", 2, with_ptx=True, tokens=36)]
PLAIN = SPLITS[True][0]
PLAINS = {
    "llama": PLAIN,
    **{family: update_case(family, family=family) for family in ("gpt2", "opt")},
}
PADDED = {
    "pad is eos": update_case("pad-is-eos", fill=EOS),
    "any token stands in the padding": update_case("pad-is-any", fill=77),
    "wider": update_case("wider", wider=True, trimmed=False),
    "untrimmed": update_case("untrimmed", trimmed=False),
}
WHITENING = Case(
    "whitening", ranks=2, function="ppo_checks.py:whitening", kwargs={"stock": "{stock}"}
)
ROLLOUTS = [
    Case(
        f"rollout-{family}-{ranks}-{zero}",
        ranks=ranks,
        function="ppo_checks.py:rollout",
        kwargs={"stock": "{stock}", "family": family, "zero": zero},
    )
    for family, ranks, zero in (("llama", 1, 0), ("gpt2", 1, 0), ("opt", 2, 0), ("llama", 2, 3))
]


def result(launches, case: Case, name: str) -> dict[str, torch.Tensor]:
    return load_file(launches[case].out / f"{name}.safetensors")


def distance(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str = ""
) -> float:
    """Return the norm of the difference over the norm of the expected value."""
    names = [name for name in expected if name.startswith(prefix)]
    assert names and {name for name in found if name.startswith(prefix)} == set(names)
    difference = torch.cat([(found[name] - expected[name]).double().flatten() for name in names])
    return (
        difference.norm() / torch.cat([expected[name].double().flatten() for name in names]).norm()
    ).item()


def plain_gradients(
    stock: Path, family: str = "llama", *, num_texts: int = 0
) -> dict[str, torch.Tensor]:
    texts = load_file(stock / "ptx.safetensors")["texts"][:num_texts]
    found = reference_gradients(
        stock, family, load_file(stock / f"experience-{family}.safetensors"), texts=texts
    )
    return {f"{role}.{name}": gradient for role in found for name, gradient in found[role].items()}


@pytest.mark.parametrize(
    "family, case",
    [
        pytest.param(name, case, id=name, marks=pytest.mark.cases(case))
        for name, case in PLAINS.items()
    ],
)
def test_the_gradient_is_that_of_the_equations(family, case, launches, stock):
    expected = plain_gradients(stock, family)
    found = result(launches, case, "gradients")
    for role in ("actor.", "critic."):
        assert distance(found, expected, role) < 1e-5


@pytest.mark.cases(*SPLITS[True])
def test_the_split_changes_neither_gradient_nor_a_plain_step(launches):
    gradients, changes = (result(launches, PLAIN, name) for name in ("gradients", "changes"))
    # At rate 1 the update is the negative gradient.
    assert distance({name: -tensor for name, tensor in changes.items()}, gradients) < 1e-5
    for case in SPLITS[True]:
        for role in ("actor.", "critic."):
            assert distance(result(launches, case, "gradients"), gradients, role) < 1e-5, (
                case.name,
                role,
            )
            assert distance(result(launches, case, "changes"), changes, role) < 1e-5, (
                case.name,
                role,
            )


@pytest.mark.cases(*SPLITS[False])
def test_the_split_hardly_changes_an_adam_step(launches):
    changes = result(launches, SPLITS[False][0], "changes")
    for case in SPLITS[False][1:]:
        for role in ("actor.", "critic."):
            assert distance(result(launches, case, "changes"), changes, role) < 1e-3, (
                case.name,
                role,
            )


@pytest.mark.cases(*SPLITS[False])
def test_the_moving_average_moves_by_its_share_of_the_update(launches):
    for case in SPLITS[False]:
        expected = {
            name: 0.25 * tensor for name, tensor in result(launches, case, "changes").items()
        }
        assert distance(result(launches, case, "ema"), expected, "actor.") < 1e-4, case.name


@pytest.mark.cases(*PTX)
def test_ptx_adds_its_gradient_in_the_same_step(launches, stock):
    for case in PTX:
        micro_batches = case.kwargs["accumulation"]
        expected = plain_gradients(stock, num_texts=micro_batches)
        for role in ("actor.", "critic."):
            assert distance(result(launches, case, "gradients"), expected, role) < 1e-5, (
                case.name,
                role,
            )
        assert launches[case].value["open_micro_steps"] == [0, 0], case.name
        moved = result(launches, case, "changes")
        assert distance({name: -tensor for name, tensor in moved.items()}, expected) < 1e-5, (
            case.name
        )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.cases(PLAIN, case))
        for name, case in PADDED.items()
    ],
)
def test_padding_changes_nothing(case, launches):
    expected = result(launches, PLAIN, "gradients")
    for role in ("actor.", "critic."):
        assert distance(result(launches, case, "gradients"), expected, role) < 1e-5


@pytest.mark.cases(*SPLITS[True], *SPLITS[False])
def test_updates_leave_the_rollout_as_it_was_and_no_micro_step_open(launches):
    for case in SPLITS[True] + SPLITS[False]:
        for rank in launches[case].ranks:
            assert rank["value"] == {"frozen": True, "open_micro_steps": [0, 0]}, case.name


@pytest.mark.cases(WHITENING)
def test_advantages_are_whitened_over_all_ranks(launches):
    for rank in launches[WHITENING].ranks:
        assert rank["value"]["error"] < 1e-6
        assert rank["value"]["alone"] > 1e-2


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=pytest.mark.cases(case)) for case in ROLLOUTS]
)
def test_a_rollout_matches_its_masks(case, launches):
    for rank in launches[case].ranks:
        assert [name for name, holds in rank["value"].items() if not holds] == []
