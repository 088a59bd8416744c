"""The memory benchmark in miniature; a row that fails is reported as failed."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from launches import ROOT, Case, environment

from scripts import bench_training_memory


def row_case(name: str):
    function = "../../scripts/_memory_rows.py:run_row"
    case = Case(
        f"bench-{name}", function=function, kwargs={"name": name, "tiny": True, "rollouts": 2}
    )
    return pytest.param(case, id=name, marks=pytest.mark.cases(case))


ROWS = [
    row_case(name)
    for name in ("sft-7b-lora-offload-32gb", "rm-7b-lora-offload-32gb", "ppo-30b-lora-mixz")
]


@pytest.mark.parametrize("case", ROWS)
def test_a_row_has_peaks_and_seconds_of_its_phases(case, launches):
    found = launches[case].value
    phases = {"load", "update", "rollout"} if found["step"] == 3 else {"load", "update"}
    assert set(found["peak_gib"]) == phases | {"all"} and min(found["peak_gib"].values()) > 0
    assert phases <= set(found["seconds"])
    if found["step"] == 3:
        assert found["shares_reference"] and found["shares_reward"]
        assert found["kl"][0] == pytest.approx(0, abs=1e-6) and found["kl"][1] != 0


def test_a_row_that_times_out_stays_in_the_table(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench_training_memory.py"),
        "--tiny",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--rows", "sft", "--timeout_s", "0.1"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "| sft-7b-lora-offload-32gb | failed: longer than 0 s |" in done.stdout
    assert (
        json.loads((tmp_path / "sft-7b-lora-offload-32gb.json").read_text())["error"]
        == "longer than 0 s"
    )


def test_a_killed_row_names_its_signal(tmp_path, monkeypatch):
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(bench_training_memory, "launcher", lambda processes: killed)
    args = SimpleNamespace(
        output=tmp_path, gpus=1, rollouts=1, ppo_flags="", tiny=True, timeout_s=60
    )
    assert bench_training_memory.attempt("sft-7b-zero3-full", args)["error"] == "ended by SIGKILL"


def test_rows_that_do_not_fit_are_listed_as_left_out(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench_training_memory.py"),
        "--output",
        str(tmp_path),
    ]
    rows = ["ppo-13b-full", "sft-7b-zero3"]
    code = f"import psutil, runpy, sys; sys.argv = {command[1:] + ['--rows', *rows]!r}; "
    code += "psutil.virtual_memory = lambda: type('Memory', (), {'total': 128 * 2**30}); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert (
        "ppo-13b-full-offload: left out, needs 240 GiB of host memory, of which there are 128\n"
        in done.stdout
    )
    assert (
        "sft-7b-zero3-full: left out, needs 110 GiB on all GPUs, of which there are 0\n"
        in done.stdout
    )
