"""No pickle is read or written except DeepSpeed's engine state, and no data becomes a file name."""

import json
import re
import shutil
import uuid
from pathlib import Path

import pytest
import torch
from test_exact_resume import flags
from transformers import AutoConfig, AutoModelForCausalLM

HOOKS = Path(__file__).with_name("hooks.py")


@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_no_step_reads_or_writes_a_pickle(step, zygote, tmp_path):
    argv = flags({"step": step, "zero": 2, "ranks": 1, "lora": False}).replace(
        "--save_interval 5", ""
    )
    run = zygote.run(
        step, tmp_path / "out", argv.replace("_steps 12", "_steps 2"), before=f"{HOOKS}:no_pickle"
    )
    assert run.statuses == [0], run.log[-3000:]
    assert run.weights()


def test_resuming_reads_pickles_from_the_checkpoint_alone(zygote, tmp_path):
    argv = flags({"step": 3, "zero": 2, "ranks": 1, "lora": False}).replace("_steps 12", "_steps 6")
    out = tmp_path / "out"
    killed = zygote.run(3, out, argv, kill_in_step=6)
    assert killed.checkpoints() == ["latest", "step_00000005"]
    run = zygote.run(3, out, f"{argv} --resume latest", before=f"{HOOKS}:told_pickles")
    assert run.statuses == [0], run.log[-3000:]
    read = {
        line.split(" ", 1)[1] for line in run.log.splitlines() if line.startswith("torch.load ")
    }
    assert len(read) == 4  # of actor and critic the weights and the optimizer
    assert {str(Path(path).parent.parent) for path in read} == {
        str(out / "checkpoints" / "step_00000005")
    }


TRAP = """
from pathlib import Path
from transformers import LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

Path({target!r}).touch()


class OwnConfig(PretrainedConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    pass


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
# Step, its flag of a model, and the kind of that model.
PLACES = {
    "step 1": (1, "--model_name_or_path", "base"),
    "step 2": (2, "--model_name_or_path", "sft"),
    "dpo": ("dpo", "--model_name_or_path", "sft"),
    "actor": (3, "--actor_model_name_or_path", "sft"),
    "critic": (3, "--critic_model_name_or_path", "reward"),
}


def trapped(
    place: str, stock: Path, folder: Path, target: Path, auto_map: dict, **config
) -> tuple[int | str, str]:
    """Return step and flags of a run whose model in `folder` brings code that makes `target`."""
    step, flag, kind = PLACES[place]
    shutil.copytree(stock / kind / "llama", folder)
    (folder / "own.py").write_text(TRAP.format(target=str(target)))
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "auto_map": auto_map, **config}))
    argv = flags({"step": step, "zero": 0, "ranks": 1, "lora": False}).replace(
        "--save_interval 5", ""
    )
    return step, f"{argv.replace('_steps 12', '_steps 1')} {flag} {folder}"


@pytest.mark.parametrize("place", PLACES)
def test_code_that_comes_with_a_model_does_not_run(place, zygote, stock, tmp_path):
    folder, target = tmp_path / "own", tmp_path / "was-run"
    step, argv = trapped(
        place, stock, folder, target, {"AutoConfig": "own.OwnConfig"}, model_type="own"
    )
    run = zygote.run(step, tmp_path / "out", argv)
    assert run.statuses == [1] and not target.exists()
    (message,) = re.findall(r"error \(rank 0\): .*comes with Python code.*", run.log)
    assert (
        PLACES[place][1] in message and str(folder) in message and "--trust_remote_code" in message
    )
    # The trap is alive.
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert target.exists()


@pytest.mark.parametrize("place", PLACES)
def test_code_beside_a_known_architecture_does_not_run_either(place, zygote, stock, tmp_path):
    folder, target = tmp_path / "own", tmp_path / "was-run"
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    step, argv = trapped(place, stock, folder, target, dict.fromkeys(names, "own.OwnModel"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run = zygote.run(step, tmp_path / "out", argv)
    assert run.statuses == [0], run.log[-3000:]
    assert not target.exists()
    # The trap is alive.
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert target.exists()


def test_data_strings_are_not_opened_as_files(zygote, stock, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    absolute = Path("/tmp") / f"absolute-{uuid.uuid4().hex}"
    names = [
        "../../up",
        str(absolute),
        "a/b",
        "..",
        "nul\0",
        "con:",
        "$(touch run)",
        "`touch run`",
        "x" * 300,
    ]
    rows = [{"prompt": name, "chosen": f" {name}", "rejected": " no"} for name in names]
    for part in ("train", "eval"):
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path for path in tmp_path.rglob("*")}
    argv = flags({"step": 3, "zero": 0, "ranks": 1, "lora": False}).replace(
        "{stock}/toy", str(data)
    )
    argv = argv.replace("_steps 12", "_steps 1").replace("--generation_batches 2", "")
    run = zygote.run(3, tmp_path / "out", f"{argv} --print_answers")
    assert run.statuses == [0], run.log[-3000:]
    new = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert new == {"out", "out.log"}
    known = {"evaluation", "metrics.jsonl", "run.json", "report.html", ".lock"}
    known |= {"actor", "critic", "actor_ema"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == known
    assert not absolute.exists() and not (tmp_path.parent / "up").exists()


def test_the_malicious_weights_run_code_if_unpickled(stock, tmp_path):
    # Reading them as a plain pickle runs their code. The steps refuse them: test_bad_input.py.
    target = stock / "was-run"
    for name in (
        "pickled/pytorch_model.bin",
        "pickled-reward/pytorch_model.bin",
        "pickled-adapter/adapter_model.bin",
    ):
        torch.load(stock / "faulty" / name, weights_only=False)
        assert target.exists()
        target.unlink()
