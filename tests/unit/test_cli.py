"""The command `dschat`, and the wheel that installs it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dschat import cli

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("dschat", "training", "inference", "scripts", "e2e_rlhf.py", "setup.py", "README.md")
SOURCES += ("requirements.txt", "LICENSE", "NOTICE", "MANIFEST.in", "pyproject.toml")


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_every_program_exists(name):
    target = cli.PROGRAMS[name].target
    file = target if target.endswith(".py") else target.replace(".", "/")
    found = [ROOT / file, ROOT / f"{file}.py", ROOT / file / "__main__.py"]
    assert any(path.is_file() for path in found)


def test_a_training_step_starts_under_the_launcher():
    main = str(ROOT / "training" / "step1_supervised_finetuning" / "main.py")
    launcher = [sys.executable, "-m", "dschat.engine.deepspeed_runner"]
    assert cli.command_of("sft", ["--seed", "1"]) == [*launcher, main, "--seed", "1"]
    assert cli.command_of("sft", ["--num_gpus", "2", "--", "--seed", "1"]) == [
        *launcher,
        "--num_gpus",
        "2",
        main,
        "--seed",
        "1",
    ]
    assert cli.command_of("sft", ["--help"]) == [sys.executable, main, "--help"]
    assert cli.command_of("doctor", []) == [sys.executable, "-m", "dschat.doctor"]


def test_an_unknown_program_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dschat", "train"])
    with pytest.raises(SystemExit, match="no program 'train'"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["dschat"])
    cli.main()
    monkeypatch.setattr(sys, "argv", ["dschat", "--version"])
    cli.main()
    shown = capsys.readouterr().out
    assert [name for name in cli.PROGRAMS if f"  {name} " not in shown] == []
    assert f"dschat {cli.version()}" in shown


def test_the_wheel_holds_all_programs_and_runs_from_another_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, ignore=skipped)
        else:
            shutil.copy(path, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    wheel = next(tmp_path.glob("dschat-*.whl"))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = set(archive.namelist())
    for name in (
        "dschat/serving/page.html",
        "dschat/programs/e2e_rlhf.py",
        "dschat/programs/inference/chat.py",
        "dschat/programs/scripts/_launch.sh",
        "dschat/programs/training/step3_rlhf_finetuning/main.py",
    ):
        assert name in names
    recipes = {path.name for path in (ROOT / "training").rglob("*.sh")}
    assert recipes <= {Path(name).name for name in names}
    assert any(name.endswith("entry_points.txt") for name in names)
    other = tmp_path / "other"
    other.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "dschat.cli", "sft", "--help"]
    done = subprocess.run(command, cwd=other, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--max_seq_len" in done.stdout, done.stderr
