"""e2e_rlhf.py on the miniature models: the three steps from one command."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import ROOT, environment
from outputs import load_plainly


def e2e(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "e2e_rlhf.py"), *words]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def tiny(family: str, output: Path, cwd: Path, *more: str) -> subprocess.CompletedProcess:
    models = ("--actor-model", f"tiny-{family}", "--reward-model", f"tiny-{family}")
    return e2e(*models, "--output-dir", str(output), *more, cwd=cwd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Run the pipeline from another folder; return its output folder and what it printed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    output = tmp_path_factory.mktemp("out") / "a folder"
    done = tiny("llama", output, elsewhere)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not list(elsewhere.iterdir()), "something was written into the working directory"
    return output, done.stdout


def check_summary(output: Path) -> dict:
    summary = json.loads((output / "summary.json").read_text())
    assert {"sft", "reward", "ppo", "samples", "models", "hardware", "versions", "seconds"} <= set(
        summary
    )
    assert summary["sft"]["perplexity_after"] < summary["sft"]["perplexity_before"]
    assert summary["reward"]["accuracy_after"] > 0.9
    wanted = {
        "score_before",
        "score_after",
        "score_gain_sd",
        "score_gain_lower95",
        "kl",
        "length_after",
        "prompts",
    }
    assert wanted <= set(summary["ppo"])
    assert summary["ppo"]["kl"] > 0
    assert len(summary["samples"]) == 3 and all(
        {"prompt", "base", "sft", "rlhf"} == set(s) for s in summary["samples"]
    )
    assert {"sft", "reward", "ppo", "summary", "total"} <= set(summary["seconds"])
    for name, path in summary["models"].items():
        load_plainly(Path(path), reward=name in ("reward", "critic"))
    return summary


def test_one_command_trains_all_three_steps_and_prints_a_summary(finished):
    output, screen = finished
    check_summary(output)
    assert (
        "independent judge" not in screen
        and str(output / "summary.json") in screen.splitlines()[-1]
    )
    for title in ("Step 1: supervised fine-tuning", "Step 2: reward model", "Step 3: PPO"):
        assert title in screen
    noise = [
        line
        for line in screen.splitlines()
        if "[INFO]" in line or "[WARNING]" in line or "Warning:" in line
    ]
    # The command's process may still print messages of imports.
    assert len(noise) <= 1, noise


def test_the_same_command_again_runs_nothing(finished, tmp_path):
    output, _ = finished
    logs = {log: log.stat().st_mtime_ns for log in output.rglob("training.log")}
    assert len(logs) == 3
    done = tiny("llama", output, tmp_path)
    assert done.returncode == 0 and done.stdout.count("finished before") == 3, done.stdout[-3000:]
    assert {log: log.stat().st_mtime_ns for log in output.rglob("training.log")} == logs
    check_summary(output)


def test_a_step_that_fails_ends_with_its_log_and_its_cause(finished, tmp_path):
    output = tmp_path / "a copy"
    shutil.copytree(finished[0], output)
    (broken,) = (path.parent for path in output.rglob("reward-models/*/config.json"))
    (broken / "model.safetensors").unlink()
    done = tiny("llama", output, tmp_path, "--step", "3")
    assert done.returncode == 1
    *_, log, cause = done.stdout.rstrip().splitlines()
    assert cause.startswith(f"error (rank 0): --critic_model_name_or_path '{broken}'"), done.stdout[
        -3000:
    ]
    assert "model.safetensors" in cause
    assert (
        log.startswith("whole log: ") and cause in Path(log.removeprefix("whole log: ")).read_text()
    )
    assert "Traceback" not in done.stdout
    assert not list(output.glob("step3-models/*/finished.json"))


def test_an_interrupted_step_resumes_from_its_checkpoint(finished, tmp_path):
    output = tmp_path / "a copy"
    shutil.copytree(finished[0], output)
    (ppo,) = output.glob("step3-models/*")
    (ppo / "finished.json").unlink()
    models = ("--actor-model", "tiny-llama", "--reward-model", "tiny-llama")
    command = [sys.executable, str(ROOT / "e2e_rlhf.py"), *models, "--output-dir", str(output)]
    (ppo / "metrics.jsonl").unlink()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
        while (
            not (ppo / "metrics.jsonl").exists()
            or (ppo / "metrics.jsonl").read_text().count("\n") < 3
        ):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 1
    screen = (tmp_path / "log").read_text()
    assert "Received SIGTERM after rollout" in screen, screen[-3000:]
    assert "Checkpoint saved" in screen, screen[-3000:]
    assert screen.rstrip().endswith(
        "Interrupted. Run the same command again to continue with the step that was running."
    )
    done = tiny("llama", output, tmp_path)
    assert done.returncode == 0 and "resuming after rollout" in done.stdout, done.stdout[-3000:]
    assert done.stdout.count("finished before") == 2
    log = (ppo / "training.log").read_text()
    assert 0 < log.find("Checkpoint saved") < log.find("resuming after rollout")
    check_summary(output)
    before, after = (
        [
            {k: v for k, v in json.loads(line).items() if k[:5] not in ("time/", "perf/")}
            for line in file.open()
        ]
        for file in (next(finished[0].glob("step3-models/*/metrics.jsonl")), ppo / "metrics.jsonl")
    )
    assert before == after


@pytest.mark.slow
def test_opt_trains_through_all_three_steps(tmp_path):
    done = tiny("opt", tmp_path / "out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    check_summary(tmp_path / "out")
