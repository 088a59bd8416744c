"""Checkpoints written in the background hold the state of the moment they were asked for."""

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dschat.checkpoint import run_checkpoint
from dschat.checkpoint.background import BackgroundSaves
from dschat.checkpoint.run_checkpoint import copy_checkpoint, newest_checkpoint, save_checkpoint
from dschat.engine.host_memory import HostMemory


class Engine:
    """Saves as DeepSpeed's does: through its checkpoint engine."""

    def __init__(self):
        flat = torch.arange(6.0)
        self.state = {
            "module": {"a": flat[:2], "b": flat[2:]},
            "optimizer": [{"exp_avg": torch.ones(3)}, ("adam", 1)],
            "scaler": SimpleNamespace(scale=8.0),
        }
        self.checkpoint_engine = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.save(self.state, f"{folder}/{tag}/state.pt")

    def train(self) -> None:
        """Change the whole state in place."""
        self.state["module"]["a"] += 100
        self.state["module"]["b"] += 100
        self.state["optimizer"][0]["exp_avg"] += 100
        self.state["scaler"].scale /= 2


def contents(engine: Engine, tensor: torch.Tensor, step: int, **facts) -> dict:
    return dict(
        engines={"model": engine},
        facts={"step": step, "processes": 1, **facts},
        tensors={"t": tensor},
        state={"epoch": [step]},
        keep=2,
    )


def copied(root, step: int, engine: Engine, tensor: torch.Tensor, memory: HostMemory):
    return copy_checkpoint(root, step, **contents(engine, tensor, step), memory=memory, group=None)


def files(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_files_are_those_of_a_save_at_the_same_moment(tmp_path):
    engine, tensor, memory = Engine(), torch.zeros(4), HostMemory()
    for step in (1, 2):
        assert save_checkpoint(tmp_path / "now", step, **contents(engine, tensor, step))
        write = copied(tmp_path / "later", step, engine, tensor, memory)
        engine.train()
        tensor += 1
        assert not (tmp_path / "later" / f"step_{step:08d}").exists()
        assert write()
    for step in (1, 2):
        name = f"step_{step:08d}"
        assert files(tmp_path / "later" / name) == files(tmp_path / "now" / name)
    assert newest_checkpoint(tmp_path / "later").step == 2
    saved = load_file(tmp_path / "later" / "step_00000002" / "rank_00000.safetensors")
    assert saved["t"].tolist() == [1.0] * 4


def test_a_copy_shares_memory_where_the_state_does_and_uses_its_buffers_again():
    memory = HostMemory()
    engine = Engine()
    first = memory.copy(engine.state)
    a, b = first["module"].values()
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert first["scaler"] is not engine.state["scaler"] and first["optimizer"][1] == ("adam", 1)
    engine.train()
    assert a.tolist() == [0, 1] and first["scaler"].scale == 8
    place = a.untyped_storage().data_ptr()
    memory.begin()
    again = memory.copy(engine.state)
    assert again["module"]["a"].untyped_storage().data_ptr() == place
    assert again["module"]["a"].tolist() == [100, 101]
    memory.begin()
    larger = memory.copy({"x": torch.arange(100)})  # memory of another size
    assert larger["x"].tolist() == list(range(100))
    assert memory.copy(torch.zeros(0)).shape == (0,)


def test_one_save_at_a_time_and_a_failure_loses_that_one_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dschat.checkpoint.run_checkpoint.logger.propagate", True)
    engine, tensor = Engine(), torch.zeros(4)
    saves = BackgroundSaves()
    assert not saves.wait()
    goes_on = threading.Event()
    write = copied(tmp_path, 1, engine, tensor, saves.memory)
    saves.start(lambda: goes_on.wait(10) and write())
    assert not saves.wait(timeout_s=0.01) and newest_checkpoint(tmp_path) is None
    goes_on.set()
    assert saves.wait() and newest_checkpoint(tmp_path).step == 1
    assert not saves.wait()  # it is over
    write = copied(tmp_path, 2, engine, tensor, saves.memory)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_checkpoint, "write_manifest", full)
        saves.start(write)
        assert not saves.wait()
    assert "Could not save checkpoint step_00000002" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    saves.start(copied(tmp_path, 3, engine, tensor, saves.memory))
    assert saves.wait() and newest_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize(
    "name, words",
    [("write_files", "A checkpoint was not saved"), ("_write_rank_files", "Could not save")],
)
def test_an_error_in_the_thread_is_a_failed_save(name, words, tmp_path, monkeypatch, caplog):
    for module in ("background", "run_checkpoint"):
        monkeypatch.setattr(f"dschat.checkpoint.{module}.logger.propagate", True)
    saves = BackgroundSaves()

    def broken(*args):
        raise MemoryError("no memory")

    monkeypatch.setattr(run_checkpoint, name, broken)
    saves.start(copied(tmp_path, 1, Engine(), torch.zeros(1), saves.memory))
    assert not saves.wait() and newest_checkpoint(tmp_path) is None
    assert words in caplog.text and "no memory" in caplog.text


def test_a_copy_that_does_not_fit_the_memory_is_a_failed_save(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dschat.checkpoint.run_checkpoint.logger.propagate", True)
    memory = HostMemory()

    def broken(num_bytes):
        raise MemoryError("no memory")

    monkeypatch.setattr(memory, "_buffer", broken)
    engine = Engine()
    engine.state["optimizer"] = []
    write = copy_checkpoint(
        tmp_path, 1, **{**contents(engine, None, 1), "tensors": {}}, memory=memory, group=None
    )
    assert not write() and "state.pt: no memory" in caplog.text
    assert list(tmp_path.iterdir()) == []
