"""Resuming is refused if the training rows are not those of the run."""

from types import SimpleNamespace

import pytest

from dschat.checkpoint.run_state import RunState


class Rows(list):
    """Rows with the digest that the preparation sets."""

    items_digest = "now"


def check(dataset: list, **facts) -> None:
    """Check the rows of a checkpoint with `facts` against `dataset`, in updates of 4 rows."""
    loader = SimpleNamespace(dataset=dataset, batch_size=2)
    config = SimpleNamespace(run=SimpleNamespace(resume="latest"))
    state = RunState(config, loader=loader, window=2, engines={}, metrics=None)
    facts = {"rows": 9, "window_rows": 4, "processes": 1, **facts}
    state._check_rows(SimpleNamespace(facts=facts))


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"rows": 8}, "had 8 training rows, and .* now give 9"),
        ({"data": "before"}, "as many training rows, but their content or order has changed"),
        ({"window_rows": 8}, "had 8 rows"),
    ],
)
def test_other_rows_are_refused(facts, message):
    with pytest.raises(ValueError, match=f"--resume latest: .*{message}"):
        check(Rows(range(9)), **facts)


@pytest.mark.parametrize("facts", [{}, {"data": None}, {"data": "now"}])
def test_the_same_rows_and_checkpoints_without_a_digest_are_resumed(facts):
    check(Rows(range(9)), **facts)


def test_rows_without_a_digest_are_compared_by_their_number():
    check(list(range(9)), data="before")
