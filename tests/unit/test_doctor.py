"""python -m dschat.doctor: its findings and remedies."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dschat import doctor
from dschat.engine import compiled_ops

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dschat.doctor", *words]
    outside = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, env=outside, capture_output=True, text=True, cwd=ROOT)


def test_every_line_is_good_or_has_a_remedy_and_a_stale_lock_is_told_of(tmp_path):
    builds = tmp_path / "builds"
    (builds / "deepspeed_shm_comm").mkdir(parents=True)
    (builds / "deepspeed_shm_comm" / "lock").touch()
    done = run(TORCH_EXTENSIONS_DIR=str(builds))
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in lines if line[:6] in ("good  ", "note  ", "BAD   ")]
    assert len(found) > 15 and all(": " in line for line in found if not line.startswith("good"))
    (told,) = [line for line in lines if str(builds / "deepspeed_shm_comm" / "lock") in line]
    assert told.startswith("note") and "--build_ops" in told
    for word in (
        "Python",
        "torch",
        "deepspeed",
        "cores",
        "ninja",
        "/dev/shm",
        "cache folder",
        "HF_HUB_OFFLINE",
    ):
        assert any(word in line for line in found), word


@pytest.mark.parametrize(
    "there, line",
    [(True, "torch is not installed: pip install 'torch"), (False, "packages: not even")],
)
def test_a_missing_package_is_named_without_a_traceback(there, line, tmp_path):
    # An environment with only the standard library and, if `there`, packaging.
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [sys.argv[1]]\n"
        "from dschat import doctor\ndoctor.main([])"
    )
    import packaging

    if there:
        (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert any(said.startswith(f"BAD   {line}") for said in done.stdout.splitlines())


def test_an_old_python_can_read_the_module():
    # Python 3.9 cannot evaluate "str | None" in annotations.
    assert isinstance(doctor.main.__annotations__["argv"], str)


def test_versions_outside_the_range_are_a_note(monkeypatch):
    assert str(doctor._check_package(Requirement("pytest>=1"))).startswith("good  pytest ")
    found = doctor._check_package(Requirement("pytest<1"))
    assert "pip install 'pytest<1'" in found.remedy and not found.stops


def test_a_lock_is_stale_only_if_no_process_builds(tmp_path):
    folder = tmp_path / "op"
    folder.mkdir()
    assert compiled_ops.stale_lock(folder) is None
    (folder / "lock").touch()
    builder = subprocess.Popen(["sleep", "60"], cwd=folder)
    try:
        assert compiled_ops.stale_lock(folder) is None
    finally:
        builder.kill()
        builder.wait()
    assert compiled_ops.stale_lock(folder) == folder / "lock"


def test_building_clears_stale_locks_and_builds_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (op,) = compiled_ops.needed_ops()
    assert op.name == "deepspeed_shm_comm" and not op.built and op.lock is None
    op.folder.mkdir()
    (op.folder / "lock").touch()

    builder = Builder(op.folder)
    monkeypatch.setattr(compiled_ops.get_accelerator(), "create_op_builder", lambda name: builder)
    assert set(compiled_ops.build_ops()) == {op.name}
    assert compiled_ops.needed_ops()[0].built and compiled_ops.build_ops() == {}
    assert builder.loads == 1
    os.utime(op.folder / f"{op.name}.so", (0, 0))  # built before this torch was installed
    assert not compiled_ops.needed_ops()[0].built
    assert set(compiled_ops.build_ops()) == {op.name} and builder.loads == 2


class Builder:
    """A stand-in for DeepSpeed's builder, which waits for torch's lock without end."""

    name = "deepspeed_shm_comm"

    def __init__(self, folder: Path):
        self.folder = folder
        self.loads = 0

    def load(self) -> None:
        assert not (self.folder / "lock").exists()
        (self.folder / f"{self.name}.so").touch()
        self.loads += 1


# Holds the lock of the builds like a rank that compiles, and torch's lock in the folder.
HOLDER = """
import sys, time
from pathlib import Path
import filelock
root = Path(sys.argv[1])
lock = filelock.FileLock(root / "dschat.lock")
lock.acquire()
(root / "deepspeed_shm_comm" / "lock").touch()
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_build_keeps_no_run_waiting(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    builder = Builder(folder)
    monkeypatch.setattr(compiled_ops.get_accelerator(), "create_op_builder", lambda name: builder)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    waiting = threading.Thread(target=compiled_ops.load_op, args=("ShareMemCommBuilder",))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive() and not builder.loads  # a build in progress is waited for
    holder.kill()
    holder.wait()
    waiting.join(10)
    assert not waiting.is_alive() and builder.loads == 1 and not (folder / "lock").exists()


def test_a_compiler_that_outlives_its_run_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    builder = Builder(folder)
    monkeypatch.setattr(compiled_ops.get_accelerator(), "create_op_builder", lambda name: builder)
    compiler = subprocess.Popen(["sleep", "60"], cwd=folder)
    waiting = threading.Thread(target=compiled_ops.load_op, args=("ShareMemCommBuilder",))
    waiting.start()
    waiting.join(compiled_ops.YOUNG_LOCK_S + 1)
    assert waiting.is_alive() and not builder.loads
    compiler.kill()
    compiler.wait()
    waiting.join(10)
    assert builder.loads == 1 and not (folder / "lock").exists()


def test_a_folder_that_is_not_writable_needs_no_lock(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "builds"))
    with compiled_ops._build_lock():
        pass


def test_a_missing_compiler_is_found(monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    found = doctor.check_compiler()[0]
    assert found.stops and "build-essential" in found.remedy
    monkeypatch.setenv("CXX", f"{sys.executable} c++")  # as with ccache
    assert not doctor.check_compiler()[0].stops


def test_a_build_that_fails_is_a_finding_among_the_others(monkeypatch, capsys):
    def fails():
        raise RuntimeError("\nc++: no such header\nmore")

    monkeypatch.setattr(compiled_ops, "build_ops", fails)
    with pytest.raises(SystemExit, match="BAD"):
        doctor.main(["--build_ops"])
    shown = capsys.readouterr().out
    assert "an operator does not compile: c++: no such header" in shown and "GiB free" in shown
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setattr(compiled_ops, "build_ops", lambda: pytest.fail("nothing to build with"))
    with pytest.raises(SystemExit, match="BAD"):
        doctor.main(["--build_ops"])


def test_the_hub_is_reached_or_not(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert doctor.check_hub().remedy == ""
    found = doctor.check_hub()
    assert "HF_ENDPOINT" in found.remedy and not found.stops


@pytest.mark.parametrize("size, small", [(doctor.GIB // 2, True), (8 * doctor.GIB, False)])
def test_small_shared_memory_is_noted(size, small, monkeypatch):
    usage = type("Usage", (), dict(total=size, free=size))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    shared = next(finding for finding in doctor.check_room() if "/dev/shm" in finding.text)
    assert ("--shm-size" in shared.remedy) == small
