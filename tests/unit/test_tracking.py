"""Ranks, failures that end with their cause, metrics, the progress line and reports."""

import errno
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dschat.tracking import dist, log, progress, report
from dschat.tracking.metrics import MetricsWriter

ROOT = Path(__file__).resolve().parents[2]
FAILURES = {
    "ValueError": ("raise ValueError('--flag 3: too small')", "--flag 3: too small", False),
    "two lines": ("raise ValueError('first\\nsecond')", "first\nsecond", False),
    "other": ("raise KeyError('k')", "KeyError: 'k'", True),
    "interrupt": ("raise KeyboardInterrupt", "interrupted", False),
}


def python(code: str, *, main: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run a main whose body is `main` inside run_main, behind `code`; stderr and stdout as one."""
    program = f"from dschat.tracking import log\n{code}\ndef main():\n    {main}\nlog.run_main(main)\n"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_ends_with_its_cause_and_status_1(case):
    body, cause, has_traceback = FAILURES[case]
    # What stands in a buffer has to come out in front of the cause.
    done = python("", main=f"print('before', end=''); {body}")
    assert done.returncode == 1
    assert done.stdout.endswith(f"\nerror (rank 0): {cause}\n")
    assert "before" in done.stdout
    assert ("Traceback" in done.stdout) == has_traceback


def test_a_users_error_shows_its_traceback_when_asked():
    done = python("", main="raise ValueError('x')", DSCHAT_DEBUG="1")
    assert "Traceback" in done.stdout and done.stdout.endswith("\nerror (rank 0): x\n")


def test_a_main_that_ends_well_exits_with_0():
    done = python("", main="log.logger.info('shown'); log.logging.getLogger('dschat.part').info('this too')")
    assert (done.returncode, done.stdout) == (0, "shown\nthis too\n")


def test_other_ranks_show_warnings_only_and_name_themselves():
    main = "log.logger.info('hidden'); log.logger.warning('shown'); raise ValueError('x')"
    done = python("log.OTHER_RANKS_WAIT_S = 0", main=main, RANK="3", LOCAL_RANK="1")
    assert (done.returncode, done.stdout) == (1, "shown\n\nerror (rank 3): x\n")


@pytest.mark.parametrize(("local_rank", "waits"), [("0", []), ("1", [log.OTHER_RANKS_WAIT_S])])
def test_ranks_behind_the_first_of_a_node_hold_back(local_rank, waits, monkeypatch, capsys):
    events = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(log.time, "sleep", lambda seconds: events.append(seconds))
    monkeypatch.setattr(log.os, "_exit", lambda status: events.append(f"exit {status}"))
    log._fail("cause")
    assert events == [*waits, "exit 1"] and log.OTHER_RANKS_WAIT_S >= 1
    assert capsys.readouterr().err == "\nerror (rank 0): cause\n"


def test_under_a_launcher_the_cause_comes_once_more_behind_its_lines(tmp_path):
    launcher = tmp_path / "deepspeed_launcher.py"
    launcher.write_text(
        "import subprocess, sys, time\n"
        "subprocess.run([sys.executable, '-c', 'from dschat.tracking.log import run_main\\n'\n"
        "    'def main(): raise ValueError(\"the cause\")\\nrun_main(main)'])\n"
        "time.sleep(0.5)\n"
        "print('the launcher on its own failure', file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, launcher], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == "\nerror (rank 0): the cause\nthe launcher on its own failure\n\nerror (rank 0): the cause\n"


def test_collectives_of_one_process():
    rows = torch.arange(6.0).view(3, 2)
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.gather_rows(rows), rows) and torch.equal(dist.gather_rows(rows, 2), rows[:2])
    parameter = torch.ones(2, requires_grad=True)
    reduced = dist.all_reduce(parameter, "max")
    assert torch.equal(reduced, torch.ones(2)) and not reduced.requires_grad
    reduced += 1
    assert torch.equal(parameter, torch.ones(2)), "a reduced tensor is a copy"
    dist.barrier()


@pytest.fixture
def as_rank_1(monkeypatch):
    """A process that the launcher calls rank 1, before it has joined a group."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")


def test_the_rank_before_a_group_exists_is_the_launchers(as_rank_1):
    assert (dist.rank(), dist.is_main(), dist.world_size()) == (1, False, 1)


# Three rows on each of two ranks, dealt out as rows 0, 2, 4 and 1, 3, 5; rank 1 has one column less.
TWO_RANKS = """
import sys
import torch
import torch.distributed
from dschat.tracking import dist

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
rows = torch.tensor([[10.0 * i, i][: 2 - rank] for i in range(rank, 6, 2)])
print(dist.gather_rows(rows, 5).tolist())
print(dist.gather_rows(torch.tensor([rank])).tolist())
value = torch.tensor(float(rank + 1))
print([dist.all_reduce(value, op).item() for op in ("sum", "max", "min")], value.item())
"""


def test_collectives_of_two_processes(tmp_path):
    command = [sys.executable, "-c", TWO_RANKS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for rank, process in enumerate(processes):
        lines = process.communicate(timeout=120)[0].splitlines()
        assert lines == [
            "[[0.0, 0.0], [10.0, 0.0], [20.0, 2.0], [30.0, 0.0], [40.0, 4.0]]",
            "[0, 1]",
            f"[3.0, 2.0, 1.0] {rank + 1.0}",
        ]


def test_metrics_are_json_lines_with_null_for_what_is_not_finite(tmp_path):
    writer = MetricsWriter(tmp_path / "new")
    writer.write(0, {"eval/loss": 1.5})
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "eval/loss": 1.5}'], "a line is there as soon as it is written"
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2})
    writer.close()
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 1, "a": None, "b": None, "c": None, "d": 2} and len(lines) == 2


def test_metrics_wait_for_a_disk_that_is_full(tmp_path, shown):
    writer = MetricsWriter(tmp_path)
    disk = writer._file
    with open("/dev/full", "wb", buffering=0) as writer._file:
        writer.write(1, {"a": 1.0})
        writer.write(2, {"a": 2.0})
        writer.sync()
    assert [("No space left on device" in line) for line in shown] == [True]
    writer._file = disk
    writer.write(3, {"a": 3.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_metrics_that_found_no_room_are_counted_at_the_end(tmp_path, shown):
    writer = MetricsWriter(tmp_path)
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)
    for step in (1, 2):
        writer.write(step, {})
    writer.close()
    assert "lacks its last 2 lines" in shown[-1]


def test_events_that_cannot_be_written_end_no_run(tmp_path, shown, monkeypatch):
    writer = MetricsWriter(tmp_path, tensorboard_dir=tmp_path / "events")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._tensorboard, "flush", full)
    writer.write(1, {"a": 1.0})
    writer.write(2, {"a": 2.0})
    writer.close()
    assert len(shown) == 1 and "no more TensorBoard events" in shown[0] and "No space left" in shown[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_metrics_go_to_tensorboard_under_the_same_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(None, tensorboard_dir=tmp_path / "events")
    for step in (1, 2):
        writer.write(step, {"policy/loss": 0.5 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [(1, 0.5), (2, 1.0)]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_ranks_write_no_metrics(tmp_path, as_rank_1):
    writer = MetricsWriter(tmp_path, tensorboard_dir=tmp_path / "events")
    writer.write(1, {"a": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """The messages of the package's logger."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(log.logger, "handlers", [handler])
    level = log.logger.level
    log.logger.setLevel(logging.INFO)
    yield lines
    log.logger.setLevel(level)


def test_progress_shows_the_first_the_last_and_a_line_every_interval(shown, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "memory_text", lambda: "1.0/2.0 GiB")
    line = progress.Progress("SFT", 40, interval_s=5.0)
    for step in range(1, 41):
        now[0] += 1.0
        line.update(step, {"loss": f"{4 - step / 40:.3f}", "tok/s": "1,024"})
    steps = [int(text.split("step ")[1].split("/")[0]) for text in shown]
    assert steps == [1, 6, 11, 16, 21, 26, 31, 36, 40]
    assert shown[1] == "SFT  step 6/40  15%  loss 3.850  tok/s 1,024  mem 1.0/2.0 GiB  left 0:34"
    assert shown[-1].endswith("left 0:00")


def test_progress_is_rank_0s(shown, as_rank_1):
    progress.Progress("SFT", 1).update(1, {})
    assert shown == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (43.4, "0:43"), (59.6, "1:00"), (3599.9, "1:00:00"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


def test_memory_of_this_process_is_part_of_the_hosts():
    used, total = progress.memory_gib()
    assert 0 < used < total


def test_write_json_leaves_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run.json"
    report.write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(report.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    # Up to the very last moment a reader sees the old file, and the new one lies whole beside it.
    monkeypatch.setattr(
        report.os,
        "replace",
        lambda a, b: (order.append((json.loads(path.read_text()), json.loads(Path(a).read_text()))), replace(a, b)),
    )
    report.write_json(path, {"a": 2})
    assert order == ["fsync", ({"a": "é"}, {"a": 2})] and json.loads(path.read_text()) == {"a": 2}
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 2}


def test_table():
    rows = [["loss", "1.5", "10"], ["accuracy, held out", "0.25", "3"]]
    assert report.table(rows, header=["", "before", "after"]).splitlines() == [
        "                    before  after",
        "------------------  ------  -----",
        "loss                   1.5     10",
        "accuracy, held out    0.25      3",
    ]


def test_a_report_names_the_machine_and_the_versions():
    assert report.versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "deepspeed", "transformers"} <= set(report.versions())
    found = report.hardware()
    assert found["cpu_cores"] >= 1 and found["host_memory_gib"] > 0 and found["cpu"]


@pytest.mark.parametrize(
    "error, word",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--per_device_train_batch_size"),
        (MemoryError(), "--offload"),
        (OSError(errno.ENOSPC, "No space left on device"), "--output_dir"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "--output_dir"),
        (torch.distributed.DistNetworkError("The server socket has failed to listen"), "master port"),
        (RuntimeError("NCCL error: unhandled system error"), "NCCL_DEBUG=INFO"),
    ],
)
def test_errors_of_the_machine_say_what_to_change(error, word):
    assert word in log.advice(error)
    assert log.advice(KeyError("x")) == ""
