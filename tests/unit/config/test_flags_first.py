"""Programs read their flags before they import torch, so that a wrong flag is reported at once."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = [
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("training/*/*.py")),
    "inference/chat.py",
    "e2e_rlhf.py",
]
HELP = """
import contextlib, io, pkgutil, runpy, sys
import dschat.config
for module in pkgutil.iter_modules(dschat.config.__path__, "dschat.config."):
    __import__(module.name)
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code and "usage:" in text.getvalue(), (program, stop.code)
    for package in ("torch", "deepspeed"):
        assert package not in sys.modules, f"{program} --help imports {package}"
print("all")
"""


def test_help_imports_neither_torch_nor_deepspeed():
    result = subprocess.run(
        [sys.executable, "-c", HELP, *PROGRAMS], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "all\n", result.stderr


def test_a_wrong_flag_is_reported_without_torch():
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; sys.modules['torch'] = None; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [sys.executable, "-c", code, PROGRAMS[0], "--no_such_flag"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "--no_such_flag: no flag of that name" in result.stderr
