"""No pickle is read or written but DeepSpeed's engine state, and no text becomes a file name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_exact_resume import flags
from transformers import AutoConfig

HOOKS = Path(__file__).with_name("hooks.py")


@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_no_step_reads_or_writes_a_pickle(step, zygote, tmp_path):
    argv = flags({"step": step, "zero": 2, "ranks": 1, "lora": False}).replace("--save_interval 5", "")
    run = zygote.run(step, tmp_path / "out", argv.replace("_steps 12", "_steps 2"), before=f"{HOOKS}:no_pickle")
    assert run.statuses == [0], run.log[-3000:]
    assert run.weights()


def test_resuming_reads_pickles_from_the_checkpoint_alone(zygote, tmp_path):
    argv = flags({"step": 3, "zero": 2, "ranks": 1, "lora": False}).replace("_steps 12", "_steps 6")
    out = tmp_path / "out"
    killed = zygote.run(3, out, argv, kill_in_step=6)
    assert killed.checkpoints() == ["latest", "step_00000005"]
    run = zygote.run(3, out, f"{argv} --resume latest", before=f"{HOOKS}:told_pickles")
    assert run.statuses == [0], run.log[-3000:]
    read = {line.split(" ", 1)[1] for line in run.log.splitlines() if line.startswith("torch.load ")}
    assert len(read) == 4  # of actor and critic the weights and the optimizer
    assert {str(Path(path).parent.parent) for path in read} == {str(out / "checkpoints" / "step_00000005")}


TRAP = """
from pathlib import Path
from transformers import PretrainedConfig

Path({target!r}).touch()


class OwnConfig(PretrainedConfig):
    model_type = "own"
"""


@pytest.mark.parametrize("flag", ["model", "actor", "critic"])
def test_code_that_comes_with_a_model_does_not_run(flag, zygote, stock, tmp_path):
    step = 1 if flag == "model" else 3
    kind = "reward" if flag == "critic" else "sft"
    folder, target = tmp_path / "own", tmp_path / "was-run"
    shutil.copytree(stock / kind / "llama", folder)
    (folder / "own.py").write_text(TRAP.format(target=str(target)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    name = "--model_name_or_path" if step == 1 else f"--{flag}_model_name_or_path"
    argv = flags({"step": step, "zero": 0, "ranks": 1, "lora": False}) + f" {name} {folder}"
    run = zygote.run(step, tmp_path / "out", argv)
    assert run.statuses == [1] and not target.exists()
    (message,) = re.findall(r"error \(rank 0\): .*comes with Python code.*", run.log)
    assert name in message and str(folder) in message and "--trust_remote_code" in message
    # The trap is alive.
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert target.exists()


def test_texts_are_no_file_names(zygote, stock, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    names = ["../../up", "/tmp/absolute", "a/b", "..", "nul\0", "con:", "$(touch run)", "`touch run`", "x" * 300]
    rows = [{"prompt": name, "chosen": f" {name}", "rejected": " no"} for name in names]
    for part in ("train", "eval"):
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path for path in tmp_path.rglob("*")}
    argv = flags({"step": 3, "zero": 0, "ranks": 1, "lora": False}).replace("{stock}/toy", str(data))
    argv = argv.replace("_steps 12", "_steps 1").replace("--generation_batches 2", "")
    run = zygote.run(3, tmp_path / "out", f"{argv} --print_answers")
    assert run.statuses == [0], run.log[-3000:]
    new = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert new == {"out", "out.log"}
    known = {"evaluation", "metrics.jsonl", "run.json", "actor", "critic", "actor_ema", ".lock"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == known
    assert not Path("/tmp/absolute").exists() and not (tmp_path.parent / "up").exists()


def test_the_trap_of_the_malicious_weights_is_alive(stock, tmp_path):
    # Whoever reads them as a plain pickle runs their code; the steps refuse them, see test_bad_input.py.
    target = stock / "was-run"
    torch.load(stock / "faulty" / "pickled" / "pytorch_model.bin", weights_only=False)
    assert target.exists()
    target.unlink()
