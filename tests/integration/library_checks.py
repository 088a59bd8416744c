"""Functions for the worker: the trainers that programs and notebooks call."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import torch
from launches import ROOT
from transformers import AutoModelForCausalLM
from worker import run_main

import dschat
from dschat.demo.tiny_models import make_tiny_model
from dschat.runtime import dist

HUB_NAME = "facebook/opt-125m"  # in the documents; a miniature stands for it
SFT = dict(
    dtype="fp32",
    max_seq_len=48,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    max_train_steps=3,
    zero_stage=3,
)
MEASURED = ("time/", "perf/")  # metrics that differ between equal runs


class Notes(dschat.Callback):
    """What the callbacks were called with."""

    def __init__(self):
        self.calls = []
        self.rows = []

    def on_update(self, step, metrics):
        self.calls.append(f"update {step}")

    def on_rollout(self, step, rows):
        self.calls.append(f"rollout {step}")
        self.rows.append(rows)

    def on_evaluate(self, step, metrics):
        self.calls.append(f"evaluate {step}")

    def on_save(self, folder):
        self.calls.append(f"save {folder.name}")


class FailAfter(dschat.Callback):
    """Ends the run after an update, on every rank."""

    every_rank = True

    def __init__(self, step):
        self.step = step

    def on_update(self, step, metrics):
        if step == self.step:
            raise RuntimeError("enough")


def rows_of(path: str) -> list[dict]:
    """Return the rows of a file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics_of(folder: str) -> list[dict]:
    """Return the lines of metrics.jsonl without what is measured."""
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in rows_of(f"{folder}/metrics.jsonl")
    ]


def same_weights(model, folder: str) -> bool:
    """Return whether a model has the weights in a folder."""
    other = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def sft(*, stock: str, out: str) -> dict[str, bool]:
    """Train on rows and a model in memory as the main does on files; stop, and resume exactly."""
    base = f"{stock}/base/llama"
    parts = [rows_of(f"{stock}/toy/{name}.jsonl") for name in ("train", "eval")]
    options = {**SFT, "deepspeed_config": f"{stock}/pieces.json"}
    words = " ".join(f"--{name} {value}" for name, value in options.items())
    run_main(
        1,
        argv=f"--model_name_or_path {base} --data_path {stock}/toy --data_split 1,0,0 {words}",
        out=f"{out}/main",
    )

    notes = Notes()
    model = AutoModelForCausalLM.from_pretrained(base)
    options |= {"output_dir": f"{out}/rows", "save_interval": 1}
    args = dschat.SFTConfig(**options)
    with contextlib.suppress(RuntimeError):
        dschat.SFTTrainer(model, args, *parts, callbacks=[FailAfter(2)]).train()
    stopped_after = len(metrics_of(f"{out}/rows"))
    args = dschat.SFTConfig(**options, resume="latest")
    result = dschat.SFTTrainer(model, args, *parts, callbacks=[notes]).train()
    expected = ["update 2", "save step_00000002", "update 3", "evaluate 3"]
    expected += ["save step_00000003", "save rows"]
    last = metrics_of(f"{out}/main")[-1]
    return {
        "stopped": stopped_after == 3,
        "same metrics": metrics_of(f"{out}/rows") == metrics_of(f"{out}/main"),
        "returned metrics": all(
            result.metrics[name] == value for name, value in last.items() if name != "step"
        ),
        "same weights": same_weights(result.model, f"{out}/main"),
        "learned": not same_weights(result.model, base),
        "callbacks": notes.calls == (expected if dist.is_main() else []),
        "start models are deleted": not (Path(out) / "rows" / "start_models").exists(),
    }


def vowels(prompts, answers, **columns):
    """Return a score for each answer."""
    return [float(sum(letter in "aeiou" for letter in answer)) for answer in answers]


def ppo(*, stock: str, out: str) -> dict[str, bool]:
    """Train on rows by a model and a function, without an output folder."""
    notes = Notes()
    args = dschat.PPOConfig(
        dtype="fp32",
        max_prompt_seq_len=32,
        max_answer_seq_len=8,
        per_device_generation_batch_size=4,
        per_device_training_batch_size=4,
        max_train_steps=2,
        eval_interval=2,
        num_warmup_steps=0,
        normalize_reward=False,
    )
    result = dschat.PPOTrainer(
        AutoModelForCausalLM.from_pretrained(f"{stock}/sft/llama"),
        args,
        rows_of(f"{stock}/toy/train.jsonl"),
        reward_model=f"{stock}/reward/llama",
        reward_funcs=vowels,
        callbacks=[notes],
    ).train()
    calls = ["evaluate 0", "rollout 1", "update 1", "rollout 2", "update 2", "evaluate 2"]
    found = {
        "callbacks": notes.calls == ([*calls, "save run"] if dist.is_main() else []),
        "all answers": [len(rows) for rows in notes.rows] == ([8, 8] if dist.is_main() else []),
        "trained": not same_weights(result.model, f"{stock}/sft/llama"),
        "a critic": result.value_model.config.num_labels == 1,
        "metrics": "rewards/vowels" in result.metrics and "eval/score" in result.metrics,
    }
    if dist.is_main():
        answers = [row["answer"] for row in notes.rows[-1]]
        mean = sum(vowels(answers, answers)) / len(answers)
        found["scores of the function"] = abs(mean - result.metrics["rewards/vowels"]) < 1e-5
        found["it can generate"] = "the" in generate(result)
    return found


def generate(result) -> str:
    """Return a text that the trained model continues."""
    inputs = result.tokenizer("the film is", return_tensors="pt").to(result.model.device)
    return result.tokenizer.decode(result.model.generate(**inputs, max_new_tokens=4)[0])


def documents(*, stock: str, out: str) -> dict[str, bool]:
    """Run the Python code of docs/library.md and of the notebook, in order, each in a folder."""
    notebook = json.loads((ROOT / "examples" / "rlhf.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    page = (ROOT / "docs" / "library.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return {
        "notebook": run_code(cells, f"{out}/notebook", stock),
        "page": run_code(snippets, f"{out}/page", stock),
        "cells and snippets": len(cells) >= 5 and len(snippets) >= 5,
    }


def run_code(parts: list[str], folder: str, stock: str) -> bool:
    """Run pieces of code one after the other, in one namespace and in an empty folder."""
    Path(folder).mkdir(parents=True)
    before = os.getcwd()
    os.chdir(folder)
    make_tiny_model(Path("miniature"), family="opt")
    os.symlink(f"{stock}/toy", "toy")
    namespace: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            for number, part in enumerate(parts):
                code = part.replace(HUB_NAME, "./miniature")
                exec(compile(code, f"part {number} of {folder}", "exec"), namespace)
    finally:
        os.chdir(before)
    return bool(printed.getvalue())
