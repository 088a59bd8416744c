"""The guides of the steps define every metric that a run writes, and no other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dschat.demo.tiny_models import make_tiny_model
from dschat.demo.toy import write_toy_data

TRAINING = Path(__file__).resolve().parents[2] / "training"
STEPS = {
    1: "step1_supervised_finetuning",
    2: "step2_reward_model_finetuning",
    "dpo": "step2_dpo_finetuning",
    3: "step3_rlhf_finetuning",
}
COMMON = "--data_split 1,1,1 --max_train_steps 2 --dtype fp32 --per_device_eval_batch_size 4"
FLAGS = {
    1: "--per_device_train_batch_size 4 --max_seq_len 32",
    2: "--per_device_train_batch_size 4 --max_seq_len 32",
    "dpo": "--per_device_train_batch_size 4 --max_seq_len 32",
    3: "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 "
    "--generation_batches 2 --max_prompt_seq_len 16 --max_answer_seq_len 4 --eval_prompts 8 "
    "--enable_hybrid_engine --generation_slots 3",
}


# Metrics of flags that are not given here, and of CUDA graphs, which a CPU does not capture.
NEED_MORE = {
    "ptx/loss",
    "time/capture_s",
    "policy/kl_loss",
    "rollout/equal_groups",
    "rollout/extra_rollouts",
    "rollout/importance_mean",
    "rollout/importance_max",
    "rollout/importance_ess",
    "rollout/importance_bounded",
}


def documented(step) -> set[str]:
    """Return the names in the first column of the tables of metrics."""
    text = (TRAINING / STEPS[step] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+) \|", text, re.MULTILINE)
    names = {name.strip() for row in rows for name in row.split(",")}
    return {
        name
        for name in names
        if re.fullmatch(r"[a-z_]+/[a-z_]+|kl_coef|reward|(actor|critic)_loss(_sum)?", name)
    }


def written(output: Path) -> list[set[str]]:
    """Return the names on each line of a run's metrics."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [set(json.loads(line)) - {"step"} for line in lines]


# All in one process, since importing takes longer than these runs.
RUN_ALL = """
import importlib.util, json, sys

for main, argv in json.loads(sys.argv[1]):
    sys.argv = [main, *argv]
    spec = importlib.util.spec_from_file_location("main", main)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[int | str, Path]:
    """Return the output folders of one short run of each step."""
    root = tmp_path_factory.mktemp("runs")
    data = write_toy_data(root / "data", num_train=48, num_eval=24)
    model = make_tiny_model(root / "model", std=0.5)
    found = {step: root / f"output{step}" for step in STEPS}
    models = {
        1: ["--model_name_or_path", model],
        2: ["--model_name_or_path", model],
        "dpo": ["--model_name_or_path", found[1]],
        3: ["--actor_model_name_or_path", found[1], "--critic_model_name_or_path", found[2]],
    }
    runs = []
    for step, output in found.items():
        argv = [
            *models[step],
            "--data_path",
            data,
            "--output_dir",
            output,
            *COMMON.split(),
            *FLAGS[step].split(),
        ]
        runs.append([str(TRAINING / STEPS[step] / "main.py"), [str(word) for word in argv]])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(runs)],
        env={**os.environ, "PYTHONPATH": str(TRAINING.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("step", STEPS)
def test_the_guide_defines_every_metric_and_no_other(step, outputs):
    before, first, last = written(outputs[step])
    assert before | first | last == documented(step) - NEED_MORE
    assert before == {name for name in last if name.startswith("eval/")} and not before & first
