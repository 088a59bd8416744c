"""A disk that is really full: a small tmpfs. If none can be mounted, test_faults.py limits file
sizes.
"""

import os
import subprocess
from pathlib import Path

import pytest
from test_faults import SFT, steps_of

DISK_KIB, LEFT_KIB = 16384, 200


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of DISK_KIB and return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(folder)]
    done = subprocess.run(mounted, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Write a file that leaves LEFT_KIB of the disk."""
    space = os.statvfs(disk)
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - LEFT_KIB * 1024)
    return ballast


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_costs_a_checkpoint_and_ends_the_run_at_the_model(
    ranks, disk, zygote, tmp_path, record
):
    argv = f"{SFT} --max_train_steps 6 --save_interval 2"
    out = disk / "out"
    whole = zygote.run(1, tmp_path / "whole", argv, ranks=ranks)
    killed = zygote.run(1, out, argv, ranks=ranks, kill_in_step=4, log=tmp_path / "log")
    assert killed.checkpoints() == ["latest", "step_00000002"], killed.log[-3000:]
    ballast = fill(disk)
    full = zygote.run(1, out, f"{argv} --resume latest", ranks=ranks, log=tmp_path / "log")
    for step in (4, 6):
        assert f"Could not save checkpoint step_{step:08d}" in full.log, full.log[-3000:]
    assert "No space left on device" in full.log and "the run continues" in full.log
    assert full.checkpoints() == ["latest", "step_00000002"] and steps_of(full) == list(range(7))
    # The rank that writes the model reports the full disk last.
    assert (
        full.statuses[0] == 1
        and "The disk is full: free some of it" in full.log.split("error (rank 0)")[-1]
    )
    assert not full.weights() and not list(disk.glob(".out*")), "half a model was left"
    ballast.unlink()
    after = zygote.run(1, out, f"{argv} --resume latest", ranks=ranks, log=tmp_path / "log")
    assert after.statuses == [0] * ranks, after.log[-3000:]
    assert after.metrics() == whole.metrics() and after.weights() == whole.weights()
    record(injected=3, survived=3, **after.lost(whole))
