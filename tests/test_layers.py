"""The shape of the package: imports point down, DeepSpeed stays in the engine, and files and functions stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What the modules of each package may import of ours besides their own package; "" is the modules right in dschat/.
ARROWS = {
    "trainers": ("engine", "algorithms", "models", "data.templates", "tracking", "config"),
    "engine": ("models", "tracking", "config"),
    "data": ("algorithms.types", "models.tokenizer", "tracking", "config"),
    "models": ("config",),
    "algorithms": (),
    "serving": (),
    "tracking": (),
    "config": (),
    "": ("engine", "models", "tracking", "config"),
}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
# File, or file and function, to the lines it may have and why.
LONGER: dict[str, tuple[int, str]] = {}


@dataclass(frozen=True)
class Import:
    module: str  # full name; of "from a import b" a.b, which may be a module
    line: int


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions and those by a constant name included."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(f"{start}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield Import(str(node.args[0].value), node.lineno)


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


def import_faults(root: Path) -> list[str]:
    """Every import below `root` that points the wrong way, one line each."""
    faults = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        parts = path.relative_to(root).parts
        layer = (parts[1] if len(parts) > 2 else "") if parts[0] == "dschat" else None
        for found in imports_of(path, root):
            where = f"{name}:{found.line} imports {found.module}"
            top = found.module.partition(".")[0]
            if top == "deepspeed" and layer != "engine":
                faults.append(f"{where}: only dschat/engine may")
            if layer is None:
                continue
            if layer not in ARROWS:
                faults.append(f"{name}: dschat/{layer} is no layer")
                break
            own = [f"dschat.{layer}"] if layer else []
            allowed = own + [f"dschat.{other}" for other in ARROWS[layer]]
            if top == "dschat" and not any(within(found.module, one) for one in allowed):
                faults.append(f"{where}: dschat/{layer} may not")
            if layer == "algorithms" and top not in ("dschat", "torch", *sys.stdlib_module_names):
                faults.append(f"{where}: the mathematics needs torch alone")
    return faults


def size_faults(root: Path) -> list[str]:
    """Every file and function below `root` that is too long, and every __init__.py with something in it."""
    faults = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py" and text:
            faults.append(f"{name}: not empty")
        lengths = {name: (len(text.splitlines()), MAX_FILE_LINES)}
        for node in ast.walk(ast.parse(text, str(path))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[f"{name} {node.name}"] = (node.end_lineno - node.lineno + 1, MAX_FUNCTION_LINES)
        for where, (length, limit) in lengths.items():
            limit = LONGER.get(where, (limit,))[0]
            if length > limit:
                faults.append(f"{where}: {length} lines, more than {limit}")
    return faults


def package_faults(root: Path) -> list[str]:
    """Every folder of modules in dschat/ without an __init__.py, which an installation would leave out."""
    folders = {path.parent for path in (root / "dschat").rglob("*.py")}
    return [f"{f.relative_to(root).as_posix()}: no __init__.py" for f in sorted(folders) if not (f / "__init__.py").exists()]


def sources(root: Path) -> list[Path]:
    """The Python files of the package and of the programs around it."""
    folders = [root / name for name in ("dschat", "training", "inference", "scripts")]
    found = [path for folder in folders for path in folder.rglob("*.py")] + list(root.glob("*.py"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def test_imports_point_down():
    assert import_faults(ROOT) == []


def test_files_and_functions_are_short():
    assert size_faults(ROOT) == []


def test_every_package_is_installed():
    assert package_faults(ROOT) == []


def test_every_exception_is_still_needed():
    lengths = {}
    for path in sources(ROOT):
        name = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lengths[name] = len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{name} {node.name}"] = node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    assert [where for where in LONGER if not lengths.get(where)] == []


@pytest.mark.parametrize("package", ["algorithms", "config.options", "tracking.report"])
def test_light_packages_load_neither_deepspeed_nor_transformers(package):
    modules = sorted(path.stem for path in (ROOT / "dschat" / "algorithms").glob("[a-z]*.py"))
    names = [f"dschat.algorithms.{name}" for name in modules] if package == "algorithms" else [f"dschat.{package}"]
    assert names
    code = f"import {', '.join(names)}, sys; print(*(n for n in ('deepspeed', 'transformers') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# One file of a tree, and the word that each fault it should raise must hold.
VIOLATIONS = {
    "upwards": ("dschat/models/a.py", "from dschat.trainers import ppo", "dschat.trainers.ppo"),
    "inside a function": ("dschat/models/a.py", "def f():\n    import dschat.engine.build", "dschat.engine.build"),
    "relative": ("dschat/config/a.py", "from ..models import tiny", "dschat.models.tiny"),
    "by name": ("dschat/algorithms/a.py", "import importlib\nimportlib.import_module('dschat.config.steps')", "config"),
    "the whole package": ("dschat/tracking/a.py", "import dschat", "imports dschat"),
    "data in a trainer": ("dschat/trainers/a.py", "from dschat.data.loaders import make_loader", "data.loaders"),
    "algorithms in data": ("dschat/data/a.py", "from dschat.algorithms.losses import policy_loss", "losses"),
    "deepspeed in a trainer": ("dschat/trainers/a.py", "import deepspeed", "only dschat/engine"),
    "deepspeed in a main": ("training/step1/main.py", "from deepspeed.accelerator import get_accelerator", "only"),
    "transformers in the mathematics": ("dschat/algorithms/a.py", "import transformers", "torch alone"),
    "a folder that is no layer": ("dschat/utils/a.py", "import os", "no layer"),
}
ALLOWED = {
    "down": ("dschat/trainers/a.py", "from dschat.engine.build import override\nfrom dschat.data.templates import render"),
    "own package": ("dschat/models/a.py", "from dschat.models.tiny import make_tiny_model\nfrom . import tiny"),
    "deepspeed in the engine": ("dschat/engine/a.py", "def f():\n    import deepspeed"),
    "anything in a main": ("training/step1/main.py", "from dschat.data.loaders import make_loader"),
    "a similar name": ("dschat/trainers/a.py", "import deepspeed_mii, dschat_extras"),
}


def tree(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("case", VIOLATIONS)
def test_the_checker_sees_a_violation(case, tmp_path):
    name, text, word = VIOLATIONS[case]
    faults = import_faults(tree(tmp_path, name, text))
    assert len(faults) == 1 and name in faults[0] and word in faults[0]


@pytest.mark.parametrize("case", ALLOWED)
def test_the_checker_lets_the_rest_pass(case, tmp_path):
    assert import_faults(tree(tmp_path, *ALLOWED[case])) == []


def test_the_checker_sees_long_and_filled_files(tmp_path):
    tree(tmp_path, "dschat/data/long.py", "\n".join(["x = 1"] * 301))
    tree(tmp_path, "dschat/data/function.py", "def f():\n" + "\n".join(["    x = 1"] * 60))
    tree(tmp_path, "dschat/data/__init__.py", "x = 1")
    tree(tmp_path, "dschat/data/fits.py", "def f():\n" + "\n".join(["    x = 1"] * 59) + "\ny = 1" * 240)
    assert size_faults(tmp_path) == [
        "dschat/data/__init__.py: not empty",
        "dschat/data/function.py f: 61 lines, more than 60",
        "dschat/data/long.py: 301 lines, more than 300",
    ]


def test_the_checker_sees_a_folder_that_an_installation_leaves_out(tmp_path):
    tree(tmp_path, "dschat/data/__init__.py", "")
    tree(tmp_path, "dschat/data/a.py", "")
    tree(tmp_path, "dschat/models/a.py", "")
    assert package_faults(tmp_path) == ["dschat/models: no __init__.py"]
