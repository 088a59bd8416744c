"""Run mains as processes that can be killed, forked from one that has done the imports.

Starting Python and its libraries costs many times what a miniature run does. This process reads
jobs, one JSON line each. For each it forks a process group with one process per rank, which run a
step's main, and answers with one JSON line of their process ids. For a job {"wait": ids} it waits
for them and answers with their exit statuses.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

# All imports of the mains, so that the children need not repeat them.
import deepspeed  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import transformers.models.opt.modeling_opt  # noqa: F401

import dschat.data.loaders  # noqa: F401
import dschat.trainers.ppo_run  # noqa: F401
import dschat.trainers.reward_plan  # noqa: F401
import dschat.trainers.supervised_run  # noqa: F401
from dschat.runtime.log import run_main
from dschat.runtime.ports import free_port
from dschat.tracking.metrics import MetricsWriter


def start(job: dict) -> list[int]:
    """Start the job's ranks and return their process ids; the first one leads their group."""
    port = free_port()
    pids = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            become_rank(job, rank, port)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def become_rank(job: dict, rank: int, port: int) -> None:
    """Run the main as `rank` and exit."""
    status = 9
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(job["ranks"]),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
        )
        os.environ["MASTER_PORT"] = str(port)
        if str(rank) in job.get("file_bytes", {}):
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"][str(rank)],) * 2)
        if job.get("plain_user"):
            drop_capabilities()
        if job.get("kill_in_step"):
            kill_in_step(job["kill_in_step"])
        if job.get("before"):
            file, _, function = job["before"].partition(":")
            getattr(load(file), function)(rank)
        sys.argv = [job["main"], *job["argv"]]
        run_main(load(job["main"]).main)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def drop_capabilities() -> None:
    """Make the permission bits of files apply to root too."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def kill_in_step(step: int) -> None:
    """Kill the group after the weights of `step` have changed and before anything is written."""
    write = MetricsWriter.write

    def killing(self, number, *args, **kwargs):
        if number == step:
            os.killpg(0, signal.SIGKILL)
        write(self, number, *args, **kwargs)

    MetricsWriter.write = killing


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait(pids: list[int], timeout_s: float) -> dict:
    """Return the ranks' exit statuses (negative: a signal) after all ended or timed out and were
    killed.
    """
    started = time.monotonic()
    statuses = {}
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > timeout_s:
            with contextlib.suppress(ProcessLookupError):  # all have just ended
                os.killpg(pids[0], signal.SIGKILL)
        time.sleep(0.005)
    return {"statuses": [statuses[pid] for pid in pids]}


def main() -> None:
    running = []  # the runs that nobody has waited for yet
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = wait(job["wait"], job["timeout_s"])
            running.remove(job["wait"])
        else:
            running.append(start(job))
            answer = {"pids": running[-1]}
        print(json.dumps(answer), flush=True)
    # Runs of tests that failed before they waited.
    for pids in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pids[0], signal.SIGKILL)


if __name__ == "__main__":
    main()
