"""Resuming is refused if the training rows are not those of the run."""

import os
from types import SimpleNamespace

import pytest

from dschat.checkpoint.run_checkpoint import Checkpoint
from dschat.checkpoint.run_state import RunState, find_checkpoint


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


def state_of(output_dir=None) -> RunState:
    """Return the state of a run that resumes from "latest"."""
    loader = SimpleNamespace(dataset=Rows(range(9)), batch_size=2)
    run = SimpleNamespace(resume="latest", output_dir=output_dir, save_interval=0)
    return RunState(SimpleNamespace(run=run), loader=loader, window=2, engines={}, metrics=None)


def test_changed_texts_are_refused_and_changed_programs_reported(caplog, monkeypatch):
    monkeypatch.setattr("dschat.checkpoint.run_state.logger.propagate", True)
    state = state_of()
    state.texts = {"--unsupervised_dataset_name": "now"}
    state.programs = {"--reward_fn a.py:f": "now"}
    facts = {
        "texts": {"--unsupervised_dataset_name": "now"},
        "programs": {"--reward_fn a.py:f": "now"},
    }
    state._check_texts_and_programs(SimpleNamespace(facts=facts, step=3))
    state._check_texts_and_programs(SimpleNamespace(facts={}, step=3))  # of an earlier version
    assert not caplog.records
    facts["programs"]["--reward_fn a.py:f"] = "before"
    state._check_texts_and_programs(SimpleNamespace(facts=facts, step=3))
    assert "--reward_fn a.py:f: its file has changed since update 3" in caplog.text
    facts["texts"]["--unsupervised_dataset_name"] = "before"
    with pytest.raises(ValueError, match="--resume latest: the texts of --unsupervised_dataset_n"):
        state._check_texts_and_programs(SimpleNamespace(facts=facts, step=3))


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_folder_of_checkpoints_that_is_not_writable_is_named(resume, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    run = SimpleNamespace(resume=resume, output_dir=str(tmp_path), save_interval=0)
    config = SimpleNamespace(run=run)
    assert find_checkpoint(config) is None
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path}: its folder checkpoints is not"):
        find_checkpoint(config)


def test_a_checkpoint_of_other_ranks_in_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "step_00000002", 2, {"processes": 2})
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="another number of ranks saved it.*is not writable"):
        checkpoint.load_engines({"model": engine})
