"""Logging, collectives, files and hardware."""

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dschat.runtime import dist, files, hardware, live_line, log
from dschat.runtime.interrupt import Interruption, release_signals
from dschat.runtime.lock import lock_folder, unlock_folder
from dschat.runtime.run_record import recorded_format

ROOT = Path(__file__).resolve().parents[3]
FAILURES = {
    "ValueError": ("raise ValueError('--flag 3: too small')", "--flag 3: too small", False),
    "two lines": ("raise ValueError('first\\nsecond')", "first\nsecond", False),
    "other": ("raise KeyError('k')", "KeyError: 'k'", True),
    "interrupt": ("raise KeyboardInterrupt", "interrupted", False),
}


def python(code: str, *, main: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run `code`, then a main with the body `main` in run_main; stderr goes to stdout."""
    program = (
        f"from dschat.runtime import log\n{code}\ndef main():\n    {main}\nlog.run_main(main)\n"
    )
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
    # Buffered output has to be printed before the cause.
    done = python("", main=f"print('before', end=''); {body}")
    assert done.returncode == 1
    assert done.stdout.endswith(f"\nerror (rank 0): {cause}\n")
    assert "before" in done.stdout
    assert ("Traceback" in done.stdout) == has_traceback


def test_a_users_error_shows_its_traceback_when_asked():
    done = python("", main="raise ValueError('x')", DSCHAT_DEBUG="1")
    assert "Traceback" in done.stdout and done.stdout.endswith("\nerror (rank 0): x\n")


def test_a_main_that_ends_well_exits_with_0():
    done = python(
        "", main="log.logger.info('shown'); log.logging.getLogger('dschat.part').info('this too')"
    )
    assert (done.returncode, done.stdout) == (0, "shown\nthis too\n")


def test_other_ranks_show_warnings_only_and_name_themselves():
    main = "log.logger.info('hidden'); log.logger.warning('shown'); raise ValueError('x')"
    done = python("log.OTHER_RANKS_WAIT_S = 0", main=main, RANK="3", LOCAL_RANK="1")
    assert (done.returncode, done.stdout) == (1, "shown\n\nerror (rank 3): x\n")


@pytest.mark.parametrize(("local_rank", "waits"), [("0", []), ("1", [log.OTHER_RANKS_WAIT_S])])
def test_only_the_first_rank_of_a_node_reports_at_once(local_rank, waits, monkeypatch, capsys):
    events = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(log.time, "sleep", lambda seconds: events.append(seconds))
    monkeypatch.setattr(log.os, "_exit", lambda status: events.append(f"exit {status}"))
    log._fail("cause")
    assert events == [*waits, "exit 1"] and log.OTHER_RANKS_WAIT_S >= 1
    assert capsys.readouterr().err == "\nerror (rank 0): cause\n"


def test_under_a_launcher_the_cause_is_printed_again_after_its_lines(tmp_path):
    launcher = tmp_path / "deepspeed_launcher.py"
    launcher.write_text(
        "import subprocess, sys, time\n"
        "subprocess.run([sys.executable, '-c', 'from dschat.runtime.log import run_main\\n'\n"
        "    'def main(): raise ValueError(\"the cause\")\\nrun_main(main)'])\n"
        "time.sleep(0.5)\n"
        "print('the launcher on its own failure', file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, launcher], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (
        done.stderr == "\nerror (rank 0): the cause\nthe launcher on its own failure\n"
        "\nerror (rank 0): the cause\n"
    )


def test_collectives_of_one_rank():
    rows = torch.arange(6.0).view(3, 2)
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.gather_rows(rows), rows) and torch.equal(
        dist.gather_rows(rows, 2), rows[:2]
    )
    parameter = torch.ones(2, requires_grad=True)
    reduced = dist.all_reduce(parameter, "max")
    assert torch.equal(reduced, torch.ones(2)) and not reduced.requires_grad
    reduced += 1
    assert torch.equal(parameter, torch.ones(2)), "a reduced tensor is a copy"
    dist.barrier()


def test_without_a_group_the_rank_is_the_one_set_by_the_launcher(as_rank_1):
    assert (dist.rank(), dist.is_main(), dist.world_size()) == (1, False, 1)


# Three rows on each of two ranks, dealt as rows 0, 2, 4 and 1, 3, 5; rank 1 has one column less.
TWO_RANKS = """
import sys
import torch
import torch.distributed
from dschat.runtime import dist

rank = int(sys.argv[1])
store = f"file://{sys.argv[2]}"
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
rows = torch.tensor([[10.0 * i, i][: 2 - rank] for i in range(rank, 6, 2)])
print(dist.gather_rows(rows, 5).tolist())
print(dist.gather_rows(torch.tensor([rank])).tolist())
value = torch.tensor(float(rank + 1))
print([dist.all_reduce(value, op).item() for op in ("sum", "max", "min")], value.item())
"""


def test_collectives_of_two_ranks(tmp_path):
    command = [sys.executable, "-c", TWO_RANKS]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(processes):
        lines = process.communicate(timeout=120)[0].splitlines()
        assert lines == [
            "[[0.0, 0.0], [10.0, 0.0], [20.0, 2.0], [30.0, 0.0], [40.0, 4.0]]",
            "[0, 1]",
            f"[3.0, 2.0, 1.0] {rank + 1.0}",
        ]


def test_write_json_keeps_the_old_file_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run.json"
    files.write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    order = []
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    # Until the rename a reader sees the old file, and the new one is complete beside it.
    monkeypatch.setattr(
        files.os,
        "replace",
        lambda a, b: (
            order.append((json.loads(path.read_text()), json.loads(Path(a).read_text()))),
            replace(a, b),
        ),
    )
    files.write_json(path, {"a": 2})
    assert order == ["fsync", ({"a": "é"}, {"a": 2})] and json.loads(path.read_text()) == {"a": 2}
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 2}


def test_a_report_names_the_machine_and_the_versions():
    assert hardware.versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "deepspeed", "transformers"} <= set(hardware.versions())
    found = hardware.hardware()
    assert found["cpu_cores"] >= 1 and found["host_memory_gib"] > 0 and found["cpu"]


@pytest.mark.parametrize(
    "error, word",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--per_device_train_batch_size"),
        (MemoryError(), "--offload"),
        (OSError(errno.ENOSPC, "No space left on device"), "--output_dir"),
        (
            Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
            "--output_dir",
        ),
        (
            torch.distributed.DistNetworkError("The server socket has failed to listen"),
            "master port",
        ),
        (RuntimeError("NCCL error: unhandled system error"), "NCCL_DEBUG=INFO"),
    ],
)
def test_errors_of_the_machine_come_with_advice(error, word):
    assert word in log.advice(error)
    assert log.advice(KeyError("x")) == ""


def test_the_recorded_format_is_found_beside_and_above_a_model(tmp_path):
    (tmp_path / "actor").mkdir()
    for text, expected in (
        ('{"text_format": "chat"}', "chat"),
        ('{"text_format": "other"}', "auto"),
        ("{", "auto"),
        ("[]", "auto"),
    ):
        (tmp_path / "run.json").write_text(text)
        for folder in (tmp_path, tmp_path / "actor"):
            assert recorded_format(str(folder), "auto") == expected
            assert recorded_format(str(folder), "plain") == "plain"
    assert recorded_format("owner/name", "auto") == "auto"


def test_nothing_is_compiled_without_a_gpu_or_a_compiler(monkeypatch):
    assert not hardware.can_compile()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    assert hardware.can_compile()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    assert not hardware.can_compile()
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert hardware.can_compile()


@pytest.mark.parametrize(
    "lines, isa, unit",
    [
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile avx512_bf16", None, "amx_bf16"),
        ("flags\t\t: fpu avx512f avx512_bf16", None, "avx512_bf16"),
        ("flags\t\t: fpu avx512f avx512_bf16", "AVX512_CORE_BF16", "avx512_bf16"),
        ("flags\t\t: fpu avx512f avx512_bf16", "avx512_core", ""),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", None, ""),
        ("Features\t: fp asimd bf16", None, "bf16"),
        ("Features\t: fp asimd asimdhp", None, ""),
        ("processor\t: 0", None, ""),
    ],
)
def test_a_cpu_multiplies_bf16_only_with_instructions_for_it(
    lines, isa, unit, tmp_path, monkeypatch
):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{lines}\n\n")
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert hardware.bf16_unit() == unit
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "none")
    assert hardware.bf16_unit() == ""


@pytest.mark.parametrize(
    "allowed, logical, physical, limit, ranks, threads",
    [
        (8, 8, 8, None, 1, 8),
        (8, 8, 4, None, 1, 4),  # two hardware threads a core
        (8, 16, 8, None, 2, 2),  # half of the machine
        (64, 64, 64, "200000 100000", 1, 2),  # a container with --cpus 2
        (64, 64, 64, "max 100000", 1, 64),
        (2, 2, 2, "50000 100000", 1, 1),
        (2, 2, 2, None, 4, 1),
        (2, None, None, None, 1, 2),
    ],
)
def test_threads_are_the_physical_cores_of_a_rank(
    allowed, logical, physical, limit, ranks, threads, tmp_path, monkeypatch
):
    import psutil

    monkeypatch.setattr(hardware, "cpu_cores", lambda: allowed)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: counts[logical])
    counts = {True: logical, False: physical}
    monkeypatch.setattr(hardware, "CGROUP_LIMIT", tmp_path / "cpu.max")
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert hardware.threads_per_rank(ranks) == threads


class Terminal(io.StringIO):
    """A terminal of 80 columns; ``screen`` is what stays on it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines = [""]
        returned = False
        for part in re.findall(r"\r|\n|[^\r\n]+", self.getvalue().replace("\x1b[A", "")):
            if part == "\n":
                lines.append("")
            elif part == "\r":
                returned = True
                continue
            else:
                lines[-1] = part + lines[-1][len(part) :] if returned else lines[-1] + part
            returned = False
        return [line.rstrip() for line in lines]


def test_a_live_line_is_replaced_and_messages_stay_above_it():
    terminal = Terminal()
    handler = live_line.TerminalHandler(terminal)

    def log(text: str, *, live: bool = False) -> None:
        record = log_record(text)
        record.live = live
        handler.emit(record)

    log("first")
    log("SFT  step 1/4", live=True)
    assert terminal.screen() == ["first", "SFT  step 1/4"]
    log("SFT  2/4", live=True)
    assert terminal.screen() == ["first", "SFT  2/4"]
    log("a message")
    assert terminal.screen() == ["first", "a message", "SFT  2/4"]
    handler.close()
    assert terminal.screen() == ["first", "a message", ""]


def log_record(text: str) -> logging.LogRecord:
    return logging.LogRecord("dschat", logging.INFO, "", 0, text, (), None)


def test_only_a_terminal_has_a_live_line(monkeypatch):
    handlers = list(log.logger.handlers)
    try:
        for stream, kind in (
            (Terminal(), live_line.TerminalHandler),
            (io.StringIO(), logging.StreamHandler),
        ):
            monkeypatch.setattr(sys, "stdout", stream)
            log.set_up_logging()
            assert type(log.logger.handlers[0]) is kind
    finally:
        log.logger.handlers[:] = handlers
        log.logger.propagate = True


def test_warnings_of_deepspeed_are_not_shown_whatever_its_level(capsys):
    deepspeed = logging.getLogger("DeepSpeed")
    before, handler = deepspeed.level, logging.StreamHandler(sys.stdout)
    deepspeed.addHandler(handler)
    try:
        deepspeed.setLevel(logging.WARNING)  # as its import does
        deepspeed.warning("no accelerator")
        deepspeed.error("a fault")
    finally:
        deepspeed.removeHandler(handler)
        deepspeed.setLevel(before)
    assert capsys.readouterr().out == "a fault\n"


def test_a_lock_is_released(tmp_path):
    lock_folder(tmp_path)
    script = "import sys; from dschat.runtime.lock import *; lock_folder(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    busy = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert busy.returncode and "another run writes to it" in busy.stderr
    unlock_folder(tmp_path)
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    unlock_folder(tmp_path)  # it holds none


def test_signals_are_handled_as_before_after_a_run():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        pass
    assert signal.getsignal(signal.SIGTERM) != before
    release_signals()
    assert signal.getsignal(signal.SIGTERM) == before
    release_signals()
