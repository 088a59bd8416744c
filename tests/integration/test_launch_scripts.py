"""The launch scripts by --dry_run, and their shared helper, with an interpreter that logs its
calls.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from launches import ROOT, environment

from dschat.config.dpo import DPOConfig
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.trainers.preflight import dry_run

CONFIGS = {
    "step1_supervised_finetuning": SFTConfig,
    "step2_reward_model_finetuning": RewardConfig,
    "step2_dpo_finetuning": DPOConfig,
    "step3_rlhf_finetuning": PPOConfig,
}
# Logs its folder and arguments and prints $STUB_SAYS. Real Python runs scripts on standard input.
INTERPRETER = """#!/usr/bin/env bash
if [[ "$1" == - || "$1" == -c ]]; then exec "$STUB_PYTHON" "$@"; fi
printf '%s\\0' "$PWD" "${WORLD_SIZE:-}" "$@" >>"$STUB_NOTES"
printf '\\n' >>"$STUB_NOTES"
printf '%s\\n' "${STUB_SAYS:-}"
exit "${STUB_STATUS:-0}"
"""
SCRIPTS = {
    str(path.relative_to(ROOT / "training")): path
    for path in sorted((ROOT / "training").rglob("run_*.sh"))
}
SWEEPS = [name for name in SCRIPTS if name.endswith("_sweep.sh")]
EVALUATIONS = [name for name in SCRIPTS if "evaluation_scripts" in name]
LAUNCHING = [name for name in SCRIPTS if name not in SWEEPS + EVALUATIONS]
SINGLE_NODE = "step1_supervised_finetuning/training_scripts/opt/single_node/run_1.3b.sh"
PPO = "step3_rlhf_finetuning/training_scripts/opt/single_node/run_1.3b.sh"
MULTI_NODE = "step1_supervised_finetuning/training_scripts/opt/multi_node/run_66b.sh"


OPT_ACTORS = (
    "opt/single_gpu/run_1.3b opt/single_gpu/run_6.7b_lora opt/single_node/run_1.3b "
    "opt/single_node/run_6.7b "
    "opt/single_node/run_13b opt/single_node/run_1.3b_lora opt/single_node/run_30b_lora "
    "opt/multi_node/run_66b"
)
OPT_REWARDS = "opt/single_gpu/run_350m opt/single_node/run_350m opt/multi_node/run_350m"
LLAMA = "llama2/run_llama2_7b llama2/run_llama2_7b_lora"
SWEEP = "opt/single_node/sweep/run_single opt/single_node/sweep/run_step"
# The published sizes, by step.
EXPECTED = {
    "step1_supervised_finetuning": f"{OPT_ACTORS} {LLAMA} llama2/run_llama2_13b "
    "llama2/run_llama2_70b "
    f"other_language/run_chinese other_language/run_japanese {SWEEP}1_sweep",
    "step2_reward_model_finetuning": (
        f"{OPT_REWARDS} {LLAMA} llama2/run_llama2_13b llama2/run_llama2_70b {SWEEP}2_sweep"
    ),
    "step2_dpo_finetuning": f"{OPT_REWARDS} {LLAMA} {SWEEP}2_sweep",
    "step3_rlhf_finetuning": f"{OPT_ACTORS} {LLAMA} llama2/run_llama2_7b_mixz "
    "llama2/run_llama2_13b llama2/run_llama2_70b "
    f"{SWEEP}3_sweep",
}


@pytest.mark.parametrize("step", EXPECTED)
def test_every_published_size_has_its_script(step):
    found = {name for name in SCRIPTS if name.startswith(f"{step}/training_scripts/")}
    assert found == {f"{step}/training_scripts/{name}.sh" for name in EXPECTED[step].split()}


def test_help_is_that_of_the_main_and_leaves_no_files(bench):
    assert bench.run(SINGLE_NODE, "--help").returncode == 0
    assert bench.notes()[0][-1] == "--help" and not list(bench.folder.iterdir())


@dataclass
class Bench:
    """A working directory elsewhere, and a machine with any number of GPUs."""

    folder: Path  # the working directory of the scripts; its path holds a space

    def run(
        self, script: str, *words: str, gpus: int = 0, **variables: str
    ) -> subprocess.CompletedProcess:
        tools = self.folder.parent / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "python").write_text(INTERPRETER)
        listing = "".join(f"GPU {i}: a card\\n  MIG 1g a part of it\\n" for i in range(gpus))
        (tools / "nvidia-smi").write_text(
            f"#!/bin/sh\n{f'printf {shlex.quote(listing)}' if gpus else 'exit 1'}\n"
        )
        (tools / "pdsh").write_text("#!/bin/sh\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)
        outside = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
        }
        stub = {
            "PYTHON": str(tools / "python"),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "STUB_NOTES": str(self.folder.parent / "notes"),
            "STUB_PYTHON": sys.executable,
        }
        (self.folder.parent / "notes").unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(SCRIPTS[script]), *words],
            cwd=self.folder,
            env={**outside, **stub, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def notes(self) -> list[list[str]]:
        """Return for each call of the interpreter its folder, $WORLD_SIZE and its arguments."""
        path = self.folder.parent / "notes"
        return (
            [line.split("\0")[:-1] for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )


@pytest.fixture
def bench(tmp_path) -> Bench:
    folder = tmp_path / "a foreign folder"
    folder.mkdir()
    return Bench(folder)


def check_the_screen_shows(log: str, screen: str):
    """Check that the screen has all lines of the log, less those of DeepSpeed's launcher."""
    noise = r"\[(INFO|WARNING)\] \[(runner|launch|real_accelerator)\.py|^DeepSpeed deepspeed\.ops"
    lines = log.splitlines()
    quiet = [line for line in lines if re.search(noise, line)]
    assert quiet and not any(line in screen for line in quiet)
    assert "\n".join(line for line in lines if line not in quiet) in screen


def models(name: str) -> list[str]:
    """Return the leading arguments that a step-3 script needs."""
    if not name.startswith("step3"):
        return []
    size = Path(name).stem.removeprefix("run_").removesuffix("_lora").removesuffix("_mixz")
    pair = (f"meta-llama/{size.replace('llama2', 'Llama-2')}-hf".replace("_", "-"),) * 2
    if not size.startswith("llama2"):
        pair = (
            "facebook/opt-1.3b" if size == "single" else f"facebook/opt-{size}",
            "facebook/opt-350m",
        )
    if name.endswith("_lora.sh") and "llama2" not in name:
        return ["--actor_model_name_or_path", pair[0], "--critic_model_name_or_path", pair[1]]
    return list(pair)


@pytest.mark.parametrize("name", LAUNCHING)
def test_every_script_plans_by_dry_run(name, bench, capsys, monkeypatch):
    done = bench.run(name, *models(name), "--dry_run")
    assert done.returncode == 0, done.stdout
    ((folder, world_size, main, *words),) = bench.notes()
    step = Path(name).parts[0]
    assert folder == str(bench.folder) and main == str(ROOT / "training" / step / "main.py")
    assert list(bench.folder.iterdir()) == []
    planned = {"single_gpu": 1, "multi_node": 64}.get(
        Path(name).parent.name, 64 if "70b" in name else 8
    )
    assert int(world_size) == planned
    config = parse_config(CONFIGS[step], words)
    assert config.run.dry_run and config.run.output_dir and config.run.deepspeed
    if step.startswith("step3") and "sweep" not in name:
        assert config.system.enable_hybrid_engine
    monkeypatch.setenv("WORLD_SIZE", world_size)
    dry_run(config)
    shown = capsys.readouterr().out
    assert (
        f"for {planned} GPU(s)" in shown
        and "GiB on a GPU" in shown
        and '"train_batch_size": ' in shown
    )


@pytest.mark.parametrize("name", LAUNCHING)
def test_every_script_is_short_and_strict(name):
    text = SCRIPTS[name].read_text()
    assert len(text.splitlines()) < 25 and os.access(SCRIPTS[name], os.X_OK)
    assert "scripts/_launch.sh" in text and "pkill" not in text
    helper = (ROOT / "scripts" / "_launch.sh").read_text()
    assert "\nset -euo pipefail\n" in helper and "pkill" not in helper


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHING)
def test_every_script_really_runs_by_dry_run(name, bench):
    done = bench.run(name, *models(name), "--dry_run", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "GiB on a GPU" in done.stdout and '"train_batch_size": ' in done.stdout
    assert list(bench.folder.iterdir()) == []


def test_a_dry_run_through_the_interpreter(bench):
    words = [
        "facebook/opt-6.7b",
        "facebook/opt-350m",
        "3",
        "2",
        "--per_device_training_batch_size",
        "2",
        "--dry_run",
    ]
    done = bench.run(PPO, *words, PYTHON=sys.executable, NUM_GPUS="2")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (
        "for 2 GPU(s)" in done.stdout
        and "reference" in done.stdout
        and '"train_batch_size": 4,' in done.stdout
    )
    assert done.stdout.index('"stage": 3') < done.stdout.index("configuration of the critic")


def test_positional_arguments_end_at_the_first_flag(bench):
    done = bench.run(SINGLE_NODE, "my output", "3", "--learning_rate", "1e-4", "9")
    assert done.returncode == 0, done.stdout
    (words,) = bench.notes()
    # The last of a flag's values counts, so the user's come after the script's.
    assert words[-3:] == ["--learning_rate", "1e-4", "9"]
    assert (
        words[words.index("--zero_stage") + 1] == "3"
        and words[words.index("--output_dir") + 1] == "my output"
    )
    assert (bench.folder / "my output" / "training.log").exists()
    bench.run(SINGLE_NODE, "", "--x")
    (words,) = bench.notes()
    assert (
        words[words.index("--zero_stage") + 1] == "2"
        and words[words.index("--output_dir") + 1] == "./output"
    )


def test_the_repository_may_be_in_a_folder_with_a_space(bench, tmp_path, monkeypatch):
    root = tmp_path / "a copy"
    for name in ("scripts", "training"):
        shutil.copytree(ROOT / name, root / name)
    monkeypatch.setitem(SCRIPTS, SINGLE_NODE, root / "training" / SINGLE_NODE)
    main = str(root / "training" / "step1_supervised_finetuning" / "main.py")
    assert bench.run(SINGLE_NODE, "--dry_run").returncode == 0 and main in bench.notes()[0]
    assert bench.run(SINGLE_NODE).returncode == 0 and main in bench.notes()[0]


def test_the_output_folder_may_come_as_a_flag(bench):
    for form in (["--output_dir", "a folder"], ["--output_dir=another folder"]):
        assert bench.run(SINGLE_NODE, "positional", *form, STUB_SAYS="words").returncode == 0
        assert (
            bench.folder / form[-1].removeprefix("--output_dir=") / "training.log"
        ).read_text() == "words\n"
    assert not (bench.folder / "positional").exists()


@pytest.mark.parametrize(
    "script, words, variables, message",
    [
        (
            SINGLE_NODE,
            ["out", "2", "3"],
            {},
            "too many positional arguments: '3' has no place. usage: bash run_1.3b.",
        ),
        (
            PPO.replace("1.3b", "6.7b"),
            [],
            {},
            "ACTOR_PATH is missing. usage: bash run_6.7b.sh ACTOR_PATH CRITIC_PATH",
        ),
        (PPO.replace("1.3b", "30b_lora"), ["a"], {}, "too many positional arguments: 'a'"),
        (SINGLE_NODE, ["file"], {}, "--output_dir file: no folder that can be written"),
        (SINGLE_NODE, ["file/below"], {}, "--output_dir file/below: no folder that can be written"),
        (SINGLE_NODE, [], {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: in use, or no port"),
        (SINGLE_NODE, [], {"NUM_GPUS": "3", "gpus": 2}, "NUM_GPUS=3: 2 GPU(s) are visible"),
        (SINGLE_NODE, [], {"NUM_GPUS": "some"}, "NUM_GPUS=some: expected a number"),
        (SINGLE_NODE, ["--dry_run"], {"NUM_GPUS": "some"}, "NUM_GPUS=some: expected a number"),
        (SINGLE_NODE, [], {"NUM_GPUS": "0"}, "NUM_GPUS=0: expected a number, at least 1"),
        (
            SINGLE_NODE,
            [],
            {"STUB_PYTHON": "false"},
            "PYTHON has no torch and deepspeed. Run scripts/quickstart.sh",
        ),
        (MULTI_NODE, [], {"HOSTFILE": "none"}, "run_66b.sh needs several nodes: set HOSTFILE"),
        (MULTI_NODE, [], {"HOSTFILE": "one"}, "HOSTFILE one names 1 node(s)"),
        (SINGLE_NODE, [], {"PYTHON": "/no/python"}, "no /no/python here"),
        (
            SINGLE_NODE.replace("run_1.3b", "sweep/run_single"),
            ["2", "yes"],
            {},
            "OFFLOAD=yes: expected true or false",
        ),
    ],
)
def test_a_mistake_is_one_message_before_anything_starts(script, words, variables, message, bench):
    (bench.folder / "file").touch()
    (bench.folder / "one").write_text("# nodes\nlocalhost slots=8\n")
    done = bench.run(script, *words, **variables)
    assert done.returncode == 1 and bench.notes() == []
    assert done.stdout.startswith(f"\nerror: {message}"), done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_refused_and_one_that_is_free_is_chosen(bench):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = bench.run(SINGLE_NODE, MASTER_PORT=port)
        assert done.returncode == 1 and f"MASTER_PORT={port}: in use" in done.stdout
    ports = set()
    for _ in range(2):
        bench.run(SINGLE_NODE)
        ((_, _, *words),) = bench.notes()
        ports.add(words[words.index("--master_port") + 1])
    assert len(ports) == 2 and all(1024 < int(port) < 65536 for port in ports)
    bench.run(SINGLE_NODE, MASTER_PORT=port)
    assert f"--master_port {port}" in " ".join(bench.notes()[0])


@pytest.mark.parametrize(
    "script, variables, command",
    [
        (SINGLE_NODE, {}, "--num_accelerators 1"),
        (SINGLE_NODE, {"NUM_GPUS": "2"}, "--num_accelerators 2"),
        (SINGLE_NODE, {"gpus": 4}, "--num_gpus 4"),
        (SINGLE_NODE, {"gpus": 4, "NUM_GPUS": "2"}, "--num_gpus 2"),
        (SINGLE_NODE, {"gpus": 4, "CUDA_VISIBLE_DEVICES": "1,3"}, "--include localhost:1,3"),
        (SINGLE_NODE.replace("single_node", "single_gpu"), {"gpus": 4}, "--num_gpus 1"),
        (MULTI_NODE, {"HOSTFILE": "two hosts"}, "--hostfile two hosts"),
    ],
)
def test_the_launcher_follows_the_machine(script, variables, command, bench):
    (bench.folder / "two hosts").write_text("a slots=8\nb slots=8\n")
    assert bench.run(script, **variables).returncode == 0
    ((_, _, *words),) = bench.notes()
    assert words[:3] == ["-m", "dschat.engine.deepspeed_runner", "--master_port"]
    words = words[4 : words.index(str(ROOT / "training" / script.partition("/")[0] / "main.py"))]
    if script != MULTI_NODE:
        assert words[:2] == ["--hostfile", ""], "not DeepSpeed's default of other machines"
        words = words[2:]
    assert " ".join(words) == command


@pytest.mark.parametrize(
    "visible, message",
    [
        ("-1", "no GPU here"),
        ("1,-1,2", "--include localhost:1"),
        ("GPU-8932f937", "knows GPUs by their numbers alone"),
    ],
)
def test_visible_gpus_are_those_of_cuda(visible, message, bench):
    done = bench.run(SINGLE_NODE, gpus=4, CUDA_VISIBLE_DEVICES=visible)
    assert message in done.stdout + " ".join(" ".join(note) for note in bench.notes())


def test_flags_may_have_dashes_within(bench):
    done = bench.run(SINGLE_NODE, "--output-dir", "elsewhere", STUB_SAYS="words")
    assert (
        done.returncode == 0
        and (bench.folder / "elsewhere" / "training.log").read_text() == "words\n"
    )
    assert not (bench.folder / "output").exists()
    bench.run(SINGLE_NODE, "--output-dir=third", STUB_SAYS="words")
    assert (bench.folder / "third" / "training.log").exists()
    for words, is_dry in (
        (["--dry-run"], True),
        (["--dry_run"], True),
        (["--dry-run=false"], False),
    ):
        bench.run(SINGLE_NODE, *words)
        assert ("dschat.engine.deepspeed_runner" not in bench.notes()[-1]) == is_dry, words


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
    ],
    ids=["torchrun", "srun"],
)
def test_a_task_of_a_running_launch_starts_no_launcher(variables, bench):
    assert bench.run(MULTI_NODE, "out", STUB_SAYS="words", **variables).returncode == 0
    ((_, _, *words),) = bench.notes()
    assert words[0] == "-u" and words[1].endswith("main.py")
    assert [path.name for path in (bench.folder / "out").iterdir()] == ["training.rank1.log"]


def test_the_whole_output_is_shown_and_logged(bench):
    done = bench.run(SINGLE_NODE, STUB_SAYS="one\ntwo")
    assert done.stdout.endswith("one\ntwo\n")
    assert (bench.folder / "output" / "training.log").read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    "said, cause, flags",
    [
        (
            "step 1\nerror (rank 0): early\nmore\nerror (rank 0): "
            "--zero_stage 5: no stage.\n--max_seq_len 1: too few.",
            ["error (rank 0): --zero_stage 5: no stage.", "--max_seq_len 1: too few."],
            "--zero_stage --max_seq_len",
        ),
        (
            "exits with return code = -9",
            ["error: a process was killed, most often because"],
            "--offload",
        ),
        (
            "ValueError: early\nValueError: no host answers\nbye",
            ["error: ValueError: no host answers"],
            "--help lists",
        ),
        ("something else", ["error: exit status 3"], "--help lists them"),
    ],
    ids=["cause", "killed", "launcher", "unknown"],
)
def test_a_failure_ends_with_cause_flag_and_log(said, cause, flags, bench):
    done = bench.run(SINGLE_NODE, STUB_SAYS=said, STUB_STATUS="3")
    assert done.returncode == 1
    *before, shown, log = done.stdout.splitlines()
    assert [line[: len(want)] for line, want in zip(before[-len(cause) :], cause)] == cause
    assert (
        shown.startswith(f"flags to look at: {flags}") and log == "whole log: ./output/training.log"
    )
    assert (bench.folder / "output" / "training.log").read_text() == said + "\n"


def test_a_failure_under_the_real_launcher_ends_the_same_way(bench, stock):
    script = SINGLE_NODE.replace("single_node", "single_gpu")
    words = ["an output", "2", "--model_name_or_path", "/no such model"]
    words += ["--data_path", f"{stock}/toy"]
    done = bench.run(script, *words, PYTHON=sys.executable, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    said, *last = done.stdout.rsplit("\n\n", 1)
    # The launcher's own message comes earlier.
    assert "exits with return code = 1" in said
    assert "Traceback" not in done.stdout
    assert last[0].splitlines() == [
        "error (rank 0): --model_name_or_path '/no such model' does not exist; give an existing "
        "model folder or a hub name.",
        "flags to look at: --model_name_or_path",
        "whole log: an output/training.log",
    ]
    log = (bench.folder / "an output" / "training.log").read_text()
    assert "'/no such model' does not exist" in log
    check_the_screen_shows(log, done.stdout)


def test_a_second_run_keeps_the_first_log_and_reports_its_own_failure(bench):
    assert (
        bench.run(
            SINGLE_NODE, STUB_SAYS="error (rank 0): --max_seq_len 1: of yesterday", STUB_STATUS="1"
        ).returncode
        == 1
    )
    done = bench.run(SINGLE_NODE, STUB_SAYS="two", STUB_STATUS="3")
    assert "error: exit status 3" in done.stdout and "yesterday" not in done.stdout
    log = (bench.folder / "output" / "training.log").read_text()
    assert log == "error (rank 0): --max_seq_len 1: of yesterday\ntwo\n"


def test_the_log_of_a_running_run_is_not_touched(bench):
    output = bench.folder / "output"
    output.mkdir()
    code = "import sys; from pathlib import Path; from dschat.runtime.lock import lock_folder; "
    code += "lock_folder(Path(sys.argv[1])); print('locked', flush=True); input()"
    words = [sys.executable, "-c", code, str(output)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        done = bench.run(SINGLE_NODE, STUB_SAYS="one")
        holder.communicate("\n")
    assert done.returncode != 0 and "--output_dir ./output: another run writes to it" in done.stdout
    assert [path.name for path in output.iterdir()] == [".lock"]
    assert bench.run(SINGLE_NODE, STUB_SAYS="one").returncode == 0


# Each check of the folder's lock takes a second, so that those of several tasks overlap.
LOOKING = """#!/usr/bin/env bash
if [[ "$1" == - ]]; then
  exec "$STUB_PYTHON" -c "$(cat)"$'\\nimport time\\ntime.sleep(1)' "${@:2}"
fi
if [[ "$1" == -c ]]; then exec "$STUB_PYTHON" "$@"; fi
"""


def test_the_tasks_of_one_run_do_not_refuse_each_other(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(LOOKING)
    stub.chmod(0o755)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("process 1 of an earlier run\n")
    command = ["bash", str(SCRIPTS[MULTI_NODE]), "out", "--resume", "latest"]
    tasks = []
    for rank in range(4):
        variables = {
            "PYTHON": str(stub),
            "STUB_PYTHON": sys.executable,
            "RANK": str(rank),
            "WORLD_SIZE": "4",
        }
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        tasks.append(
            subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **variables}, **options)
        )
    said = [task.communicate(timeout=60)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, said


# A launcher that ends at once on a signal, and a child that saves first, as DeepSpeed's do.
SAVING = """#!/usr/bin/env bash
if [[ "$1" == - || "$1" == -c ]]; then exec "$STUB_PYTHON" "$@"; fi
(trap 'sleep 1; echo saved; exit 0' TERM; echo begun; while :; do sleep 0.05; done) &
wait
"""


@pytest.mark.parametrize(
    "to_group, number", [(True, signal.SIGINT), (False, signal.SIGTERM)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_to_the_script_lets_the_run_save(to_group, number, tmp_path):
    stub = tmp_path / "python"
    stub.write_text(SAVING)
    stub.chmod(0o755)
    variables = {**os.environ, "PYTHON": str(stub), "STUB_PYTHON": sys.executable}
    command = ["bash", str(SCRIPTS[SINGLE_NODE]), "out"]
    options = dict(
        cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with subprocess.Popen(command, start_new_session=True, **options) as script:
        while script.stdout.readline() != "begun\n":
            pass
        (os.killpg if to_group else os.kill)(script.pid, number)
        rest = script.communicate(timeout=30)[0]
    assert "saved\n" in rest and "stopped by a signal" in rest and script.returncode == 143
    assert (tmp_path / "out" / "training.log").read_text().endswith("saved\n")


def test_ctrl_c_at_a_script_saves_a_run_that_resumes(stock, tmp_path):
    words = f"{TINY_SFT} --learning_rate 1e-3".replace(
        "--max_train_steps 2", "--max_train_steps 80"
    ).format(stock=stock)
    command = ["bash", str(SCRIPTS[SINGLE_NODE]), "out", "2", *words.split()]
    variables = {**environment(), "PYTHON": sys.executable, "NUM_GPUS": "2"}
    options = dict(
        cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    with subprocess.Popen(command, start_new_session=True, **options) as script:
        deadline = time.monotonic() + 120
        while script.poll() is None and not (
            metrics.exists() and metrics.read_bytes().count(b"\n") > 2
        ):
            assert time.monotonic() < deadline, "no step in two minutes"
            time.sleep(0.05)
        os.killpg(script.pid, signal.SIGINT)
        said = script.communicate(timeout=60)[0]
    assert "Checkpoint saved" in said and script.returncode == 143, said[-3000:]
    (step,) = (int(path.name[5:]) for path in (tmp_path / "out" / "checkpoints").glob("step_*"))
    done = subprocess.run([*command, "--resume", "latest"], timeout=200, **options)
    assert done.returncode == 0 and f"resuming after update {step}" in done.stdout, done.stdout[
        -3000:
    ]
    log = (tmp_path / "out" / "training.log").read_text()
    assert "Checkpoint saved" in log and f"resuming after update {step}" in log


@pytest.mark.parametrize("name, runs", list(zip(SWEEPS, (8, 4, 4, 18))))
def test_a_sweep_runs_every_combination_in_a_separate_folder(name, runs, bench):
    done = bench.run(name, "--max_train_steps", "3")
    assert done.returncode == 0, done.stdout
    notes = bench.notes()
    assert len(notes) == runs == len(list(bench.folder.glob("z*/training.log")))
    assert all(words[-2:] == ["--max_train_steps", "3"] for words in notes)
    assert len({tuple(word for word in words if not word.isdigit()) for words in notes}) == runs
    if "step3" in name:
        assert (bench.folder / "z2_he_true_offload_false_lora_true" / "training.log").exists()
    done = bench.run(name, STUB_STATUS="1")
    assert done.returncode == 1 and len(bench.notes()) == runs
    assert done.stdout.splitlines()[-1].startswith(f"error: {runs} run(s) failed: z2_")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_scripts_pass_flags_on(name, bench):
    assert bench.run(name, "--dtype", "fp32").returncode == 0
    ((_, _, program, *words),) = bench.notes()
    assert Path(program).exists() and words[-2:] == ["--dtype", "fp32"]


TINY = "--data_path {stock}/toy --dtype fp32 --max_train_steps 2"
TINY_SFT = f"--model_name_or_path {{stock}}/base/opt --max_seq_len 48 {TINY}"
TINY_PPO = (
    f"{TINY} --max_prompt_seq_len 24 --max_answer_seq_len 4 --eval_prompts 8 "
    "--per_device_eval_batch_size 8"
)


@pytest.mark.parametrize(
    "name, words",
    [
        (SINGLE_NODE, f"out 2 {TINY_SFT}"),
        (PPO, f"{{stock}}/sft/opt {{stock}}/reward/opt 2 2 out {TINY_PPO}"),
    ],
    ids=["step 1", "step 3"],
)
def test_the_two_command_lines_of_the_quickstart(name, words, bench, stock):
    variables = {key: environment()[key] for key in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    done = bench.run(
        name,
        *(word.format(stock=stock) for word in words.split()),
        PYTHON=sys.executable,
        **variables,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    output = bench.folder / "out"
    (model,) = (
        output.rglob("model.safetensors")
        if "step1" in name
        else output.rglob("actor/model.safetensors")
    )
    assert model.stat().st_size > 0 and list(output.glob("**/events.out.tfevents*"))
    log = (output / "training.log").read_text()
    assert "memory plan" in log
    check_the_screen_shows(log, done.stdout)
    progress = [line for line in log.splitlines() if "step 2/2" in line]
    shown = ("score ", "KL ", "tok/s ") if "step3" in name else ("loss ", "tok/s ")
    assert all(word in progress[-1] for word in (*shown, "mem ", "GiB", "left "))
