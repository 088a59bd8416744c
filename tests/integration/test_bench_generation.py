"""The generation benchmark on two processes, in miniature."""

import json
import subprocess
import sys

import pytest
from launches import ROOT, environment


def bench(*words: str, script: str = "bench_generation.py") -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(ROOT / "scripts" / script),
        "--shape",
        "tiny-llama",
        *words,
    ]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)


def test_two_processes_answer_under_zero_3_and_time_the_gathering(tmp_path):
    file = tmp_path / "rows.json"
    paths = ["zero3", "zero3-compiled", "zero3-tp"]
    sizes = [
        "--batch",
        "2",
        "--prompt",
        "8",
        "--answer",
        "6",
        "--repeats",
        "1",
        "--dtype",
        "float32",
    ]
    done = bench("--gpus", "2", "--paths", *paths, *sizes, "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["path"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == paths
    for path, row in rows.items():
        assert row["gpus"] == 2
        assert row["tokens_per_s"] == pytest.approx(2 * 2 / (row["ms_per_step"] / 1e3))
        # Weights are gathered for every rollout, not only for the first. An empty gather takes
        # microseconds.
        assert (1e-4 < row["gather_s"] < row["rollout_s"]) == (path != "zero3")
    assert rows["zero3-tp"]["limit_ms"] < rows["zero3-compiled"]["limit_ms"]
    assert done.stdout.count("Hybrid Engine under ZeRO-3, tensor parallel") == 1, (
        "one process reports"
    )


def test_slots_are_measured_beside_batches(tmp_path):
    file = tmp_path / "rows.json"
    sizes = "--rows 12 --batch 4 --slots 4 12 --mean 6 --answer 20 --repeats 1 --dtype float32"
    prompts = "--shortest_prompt 3 --longest_prompt 9"
    done = bench(*sizes.split(), *prompts.split(), "--json", str(file), script="bench_slots.py")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["slots"] for row in rows] == [0, 4, 12]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert rows[0]["busy"] is None and rows[1]["busy"] > 0.5


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ("--gpus", "2", "--paths", "plain", "zero3"),
            "--paths plain: on several GPUs only paths under ZeRO-3",
        ),
        (("--paths", "zero3-tp"), "--paths zero3-tp needs --gpus 2 or more"),
        (
            ("--gpus", "3", "--paths", "zero3-tp"),
            "--inference_tp_size 3 does not divide the model's 4 attention heads",
        ),
    ],
)
def test_unmeasurable_options_are_refused_before_anything_starts(words, message):
    done = bench(*words)
    assert done.returncode == 2 and message in done.stderr
