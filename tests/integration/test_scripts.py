"""scripts/quickstart.sh and test.sh, with an interpreter that only logs its calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Acts as Python: creates environments that hold itself, and logs what pip should install.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
    --version) echo "Python ${STUB_VERSION:-3.11.0}" ;;
    *version_info\\ \\<*) exit "${STUB_TOO_OLD:-0}" ;;
    *base_prefix*) exit "${STUB_IN_VENV:-0}" ;;
    *importlib.metadata*) echo torch9.9-python3.11 ;;
    *sysconfig*) echo "${STUB_HEADERS:-$(dirname "$STUB_LOG")}" ;;
    "- "*) echo 9.9; exit "${STUB_NO_TORCH:-0}" ;;
    "-m pip --version") ;;
    "-m pip "*) echo "$*" >>"$STUB_LOG"; echo "words of pip"; exit "${STUB_PIP:-0}" ;;
    "-m venv "*)
        mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; echo "venv $*" >>"$STUB_LOG" ;;
    *) printf '<%s>' "$@"; printf '\\n%s\\n%s\\n' "$TORCH_EXTENSIONS_DIR" "${PATH%%:*}" ;;
esac
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """Copy the scripts, and place stand-ins for Python, a compiler and Python's headers beside
    them.
    """
    (tmp_path / "Python.h").touch()
    for name, text in (("python", INTERPRETER), ("c++", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return copy(tmp_path / "copy")


def copy(root: Path) -> Path:
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("setup.py", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    return root


def run(
    root: Path, *argv: str, script: str = "quickstart.sh", **environment: str
) -> subprocess.CompletedProcess:
    outside = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TORCH_EXTENSIONS_DIR", "DSCHAT_TORCH")
    }
    stub = {
        "PYTHON": str(root.parent / "python"),
        "STUB_LOG": str(root.parent / "log"),
        "DSCHAT_CACHE": str(root.parent / "cache"),
    }
    # No GPU, whatever this machine has.
    (root.parent / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (root.parent / "nvidia-smi").chmod(0o755)
    path = f"{root.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", root / "scripts" / script, *argv],
        cwd="/",
        env={**outside, **stub, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def path_with_gpu(root: Path) -> str:
    """Return a PATH on which nvidia-smi works."""
    folder = root.parent / "gpu"
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\n")
    (folder / "nvidia-smi").chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def log(root: Path) -> list[str]:
    file = root.parent / "log"
    return file.read_text().splitlines() if file.exists() else []


def test_the_first_run_installs_and_the_second_does_not(repository):
    root = repository
    first = run(root, "--a", "b c", STUB_NO_TORCH="1")
    assert first.returncode == 0, first.stderr
    pip = "-m pip install --disable-pip-version-check --no-input"
    assert log(root) == [
        f"venv -m venv {root}/.venv",
        f"{pip} torch==2.13.0",
        f"{pip} --editable {root}[demo]",
    ]
    ran = [
        f"<{root}/e2e_rlhf.py><--a><b c>",
        f"{root.parent}/cache/torch_extensions/torch9.9-python3.11",
        f"{root}/.venv/bin",
    ]
    assert first.stdout.splitlines()[-3:] == ran
    second = run(root, "--a", "b c")
    assert second.stdout.splitlines()[-3:] == ran and "(complete" in second.stdout
    assert len(log(root)) == 3


def test_the_tests_need_more_than_the_demo_and_the_demo_no_more_than_the_tests(repository):
    root = repository
    assert run(root, "-k", "x", script="test.sh").stdout.splitlines()[-3] == "<-m><pytest><-k><x>"
    assert log(root)[-1].endswith(f"--editable {root}[test]")
    assert run(root).returncode == 0 and len(log(root)) == 2
    shutil.rmtree(root / ".venv")
    run(root)
    run(root, script="test.sh")
    assert [line.rsplit("[")[-1] for line in log(root)[2:] if "editable" in line] == [
        "demo]",
        "test]",
    ]


def test_changed_requirements_are_installed_into_the_same_environment(repository):
    root = repository
    run(root)
    with open(root / "requirements.txt", "a") as file:
        file.write("more\n")
    assert "there already" in run(root).stdout
    assert [line.split()[0] for line in log(root)] == ["venv", "-m", "-m"]


def test_a_torch_in_range_is_kept(repository):
    root = repository
    assert "torch 9.9 (there already)" in run(root).stdout
    assert (
        log(root)[0] == f"venv -m venv --system-site-packages {root}/.venv" and len(log(root)) == 2
    )
    shutil.rmtree(root / ".venv")
    # What is in a separate virtual environment cannot be seen from another.
    run(root, STUB_IN_VENV="1")
    assert log(root)[2] == f"venv -m venv {root}/.venv"


def test_gpu_choice_and_user_overrides(repository):
    root = repository
    run(root, STUB_NO_TORCH="1", DSCHAT_TORCH="torch==8.8")
    assert log(root)[1].endswith(" torch==8.8")
    shutil.rmtree(root / ".venv")
    run(root, STUB_NO_TORCH="1", PATH=path_with_gpu(root))
    wanted = next(
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith("torch>=")
    )
    assert log(root)[4].endswith(f" {wanted}")


def test_a_failed_installation_shows_the_end_of_pips_output_and_is_retried(repository):
    root = repository
    done = run(root, STUB_PIP="1")
    assert done.returncode == 1 and "e2e" not in done.stdout
    assert done.stderr == (
        f"\nwords of pip\n\nerror: pip install --editable {root}[demo] failed; "
        f"the whole log is in {root}/.venv/install.log\n"
    )
    assert run(root).returncode == 0 and len(log(root)) == 3


def test_unusable_interpreters_and_environments_are_refused(repository):
    root = repository
    done = run(root, STUB_TOO_OLD="1", STUB_VERSION="3.8.1")
    assert (
        done.returncode == 1
        and "is Python 3.8.1; 3.10 or later is needed. Set PYTHON" in done.stderr
    )
    done = run(root, PYTHON="/no/python")
    assert done.returncode == 1 and "no /no/python here" in done.stderr
    (root / ".venv").mkdir()
    (root / ".venv" / "mine").touch()
    done = run(root)
    assert (
        done.returncode == 1
        and f"{root}/.venv exists and was not made by this script" in done.stderr
    )
    assert (root / ".venv" / "mine").exists() and log(root) == []


def test_a_moved_repository_gets_a_new_environment(repository):
    run(repository)
    moved = repository.rename(repository.parent / "moved")
    done = run(moved)
    assert done.returncode == 0 and f"{moved}/.venv (new" in done.stdout
    assert log(moved)[2].endswith(f"{moved}/.venv")


def test_a_repository_whose_path_has_a_space(repository):
    """torch hands the path of its libraries to the linker unquoted, so they must be elsewhere."""
    root = copy(repository.parent / "a copy")
    done = run(root, "b c")
    assert done.returncode == 0, done.stderr
    environment = (root / ".venv").resolve()
    assert environment.parent == root.parent / "cache" / "venv" and " " not in str(environment)
    assert log(root)[0].endswith(str(environment)) and log(root)[1].endswith(
        f"--editable {root}[demo]"
    )
    assert done.stdout.splitlines()[-3::2] == [f"<{root}/e2e_rlhf.py><b c>", f"{environment}/bin"]
    assert "(complete" in run(root).stdout and len(log(root)) == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"CXX": "no-compiler"}, "no C++ compiler (no-compiler): "),
        ({"STUB_HEADERS": "/nowhere"}, "no /nowhere/Python.h: "),
        (
            {"DSCHAT_CACHE": "/tmp/with space"},
            "the cache folder /tmp/with space has a space in its name: ",
        ),
    ],
)
def test_without_a_gpu_what_compiling_needs_is_checked_first(missing, message, repository):
    done = run(repository, **missing)
    assert done.returncode == 1 and message in done.stderr
    assert [line for line in log(repository) if "pip install" in line] == []
    assert run(repository, PATH=path_with_gpu(repository), **missing).returncode == 0
