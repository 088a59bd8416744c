"""Checkpoints in one process: which are kept, and that hosts must share the folder."""

import signal

import pytest
import torch

from dschat.checkpoint import run_checkpoint, run_state
from dschat.checkpoint.run_checkpoint import (
    Checkpoint,
    is_shared,
    newest_checkpoint,
    save_checkpoint,
)
from dschat.config.parse import config_dict, parse_config
from dschat.config.sft import SFTConfig
from dschat.engine.ema import MovingAverage
from dschat.runtime import dist, interrupt
from dschat.runtime.interrupt import Interruption


def save(root, step: int, *, keep: int = 0, engines=()) -> bool:
    facts = {"step": step, "processes": 1}
    options = dict(
        engines=dict.fromkeys(engines),
        facts=facts,
        tensors={"t": torch.ones(2)},
        state={},
        keep=keep,
    )
    return save_checkpoint(root, step, **options)


def folders(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def warnings(monkeypatch, caplog):
    monkeypatch.setattr("dschat.checkpoint.run_checkpoint.logger.propagate", True)
    return caplog


def test_the_oldest_checkpoint_is_deleted_after_the_newest_is_saved(tmp_path):
    for step in (2, 4, 10, 100):
        assert save(tmp_path, step, keep=2)
    assert folders(tmp_path) == ["latest", "step_00000010", "step_00000100"]
    assert newest_checkpoint(tmp_path).step == 100


def test_files_have_the_mode_of_the_umask(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "new").touch()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4 and len({path.stat().st_mode for path in files}) == 1


def test_damaged_newer_checkpoints_do_not_push_out_those_of_this_run(tmp_path):
    for step in (900, 1000):
        assert save(tmp_path, step)
        (tmp_path / f"step_{step:08d}" / "facts.json").unlink()
    assert newest_checkpoint(tmp_path) is None
    for step in (100, 200, 300):
        assert save(tmp_path, step, keep=2)
        assert newest_checkpoint(tmp_path).step == step
    assert folders(tmp_path)[1:3] == ["step_00000200", "step_00000300"]


def test_files_missing_from_the_shared_folder_fail_the_checkpoint(tmp_path, monkeypatch, warnings):
    assert save(tmp_path, 1)

    def elsewhere(engine, folder, name):
        return {folder / "rank_00001.pt": {"size": 3, "sha256": "0"}}, ""

    monkeypatch.setattr(run_checkpoint, "save_engine", elsewhere)
    assert not save(tmp_path, 2, engines=["model"], keep=1)
    assert (
        "rank_00001.pt is missing" in warnings.text
        and "is it shared by all hosts?" in warnings.text
    )
    assert (
        folders(tmp_path) == ["latest", "step_00000001"] and newest_checkpoint(tmp_path).step == 1
    )


def test_a_folder_is_shared_only_if_all_ranks_see_the_same_one(tmp_path, monkeypatch):
    assert is_shared(tmp_path) and not list(tmp_path.iterdir())
    # Rank 0 writes its mark on another host.
    monkeypatch.setattr(dist, "is_main", lambda: False)
    assert not is_shared(tmp_path)


def test_a_shared_folder_is_needed_only_with_checkpoints(tmp_path, monkeypatch):
    class Config:
        class run:
            output_dir, resume, save_interval = str(tmp_path), None, 0

    monkeypatch.setattr(run_state, "is_shared", lambda folder: False)
    assert run_state.find_checkpoint(Config) is None
    Config.run.save_interval = 5
    with pytest.raises(
        ValueError,
        match="--output_dir .* is not the same folder on all ranks.*--save_interval",
    ):
        run_state.find_checkpoint(Config)


def test_ignore_memory_plan_may_be_given_when_resuming(monkeypatch, tmp_path):
    monkeypatch.setattr(run_state, "config_dict", lambda config: config)
    monkeypatch.setattr(run_state, "default_dict", lambda config: {})
    config = {"ignore_memory_plan": True, "seed": 1}
    before = Checkpoint(
        tmp_path, 1, {"processes": 1, "config": {"ignore_memory_plan": False, "seed": 1}}
    )
    run_state._check_flags(config, before)
    with pytest.raises(AttributeError):  # the message needs run.resume
        run_state._check_flags(config | {"seed": 2}, before)


def test_flags_that_a_checkpoint_does_not_know_had_their_defaults(tmp_path):
    words = "--model_name_or_path m --data_path d --output_dir o --resume latest".split()
    config = parse_config(SFTConfig, words)
    older = config_dict(config)
    del older["tokens_per_batch"], older["packing"]
    before = Checkpoint(tmp_path, 1, {"processes": 1, "config": older})
    run_state._check_flags(config, before)
    newer = parse_config(SFTConfig, [*words, "--packing"])
    with pytest.raises(ValueError, match="--packing was False and is True"):
        run_state._check_flags(newer, before)


@pytest.mark.parametrize(
    "stage, processes, read", [(0, 4, [0]), (2, 2, [1]), (3, 2, [1]), (2, 3, [0, 1, 2])]
)
def test_a_moving_average_reads_only_the_files_with_its_pieces(stage, processes, read, monkeypatch):
    average = MovingAverage.__new__(MovingAverage)
    average.engine = type(
        "Engine",
        (),
        {"module": torch.nn.Linear(1, 1), "zero_optimization_stage": lambda self: stage},
    )()
    average._pieces = {}
    asked = []

    class Saved:
        checkpoint = Checkpoint(None, 1, {"processes": processes})

        def of_rank(self, rank):
            asked.append(rank)
            return {}, {"starts": {}}

    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    average.restore(Saved())
    assert asked == read


def test_a_signal_during_the_final_save_waits_for_it(monkeypatch, request):
    said = []
    original = signal.getsignal(signal.SIGTERM)

    def before(number, frame):
        said.append("the run has ended")

    signal.signal(signal.SIGTERM, before)  # a failure must not end pytest
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, original))
    monkeypatch.setattr(interrupt, "_write_stderr", said.append)
    interruption = Interruption()
    with interruption:
        pass
    signal.raise_signal(signal.SIGTERM)
    assert len(said) == 1 and "the model is being saved" in said[0]
    with Interruption() as following:
        signal.raise_signal(signal.SIGTERM)
        assert "will stop after this step" in said[1] and following.agreed() == signal.SIGTERM
    following.release()
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ZeroDivisionError), Interruption():
        1 / 0
    assert signal.getsignal(signal.SIGTERM) == before
