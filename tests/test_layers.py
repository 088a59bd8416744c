"""The structure of the package.

Imports point down without cycles, only engine/ imports DeepSpeed, and functions are short.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The packages that the modules of each package of dschat may import, besides their own. "" is for
# the modules in dschat/ itself.
ARROWS = {
    "steps": (
        *("trainers", "checkpoint", "engine", "data", "models"),
        *("tracking", "config", "runtime"),
    ),
    "trainers": (
        *("memory", "checkpoint", "engine", "generation", "models"),
        *("data.encoding", "data.messages", "algorithms", "report", "tracking", "config"),
        *("rewards", "runtime"),
    ),
    "memory": (
        *("engine", "generation", "models", "tracking.table", "algorithms.logprobs"),
        *("config", "runtime"),
    ),
    "checkpoint": ("engine", "models", "tracking", "config", "runtime"),
    "serving": ("generation", "data", "models", "algorithms.masks", "config", "runtime"),
    "engine": ("generation", "models", "config", "runtime"),
    "generation": ("models", "config", "runtime"),
    "data": (
        "algorithms.types",
        "algorithms.grouping",
        "models.tokenizer",
        "models.turn_end",
        "config",
        "runtime",
    ),
    "demo": ("models", "config", "runtime"),
    "models": ("config", "runtime"),
    "pipeline": ("tracking", "config", "runtime"),
    "report": ("runtime",),
    "tracking": ("runtime",),
    "config": ("runtime",),
    "runtime": (),
    "algorithms": (),
    "rewards": ("config", "runtime"),
    "": ("steps", "engine", "memory", "models", "tracking", "config", "runtime"),
}
# It makes names of other modules importable from dschat, each when it is first used.
FILLED_PACKAGE = "dschat/__init__.py"
# Most lines of a function below its signature. Look again at one over 60.
MAX_FUNCTION_LINES = 75


@dataclass(frozen=True)
class Import:
    module: str  # full name; "from a import b" is a.b, which may be a module
    line: int


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Yield every import of a file, also inside functions and by a constant name."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(f"{start}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if called in ("import_module", "__import__"):
                yield Import(str(node.args[0].value), node.lineno)


def within(module: str, allowed: str) -> bool:
    """Return whether `module` is `allowed` or part of it."""
    return module == allowed or module.startswith(allowed + ".")


def import_faults(root: Path) -> list[str]:
    """Return a line for each import below `root` that points the wrong way."""
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
    """Return a line for each function that is too long and each __init__.py that is not empty."""
    faults = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py" and text and name != FILLED_PACKAGE:
            faults.append(f"{name}: not empty")
        for node in ast.walk(ast.parse(text, str(path))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.body[0].lineno + 1
                if length > MAX_FUNCTION_LINES:
                    faults.append(
                        f"{name} {node.name}: {length} lines, more than {MAX_FUNCTION_LINES}"
                    )
    return faults


def import_graph(root: Path) -> dict[str, set[str]]:
    """Map each module of dschat to the modules of dschat that it imports, also in functions."""
    modules = {}
    for path in (root / "dschat").rglob("*.py"):
        if path.name != "__init__.py":
            modules[".".join(path.relative_to(root).with_suffix("").parts)] = path
    graph = {}
    for module, path in modules.items():
        graph[module] = set()
        for found in imports_of(path, root):
            # "from a import b" is a.b: the module a.b, or a name in the module a.
            for name in (found.module, found.module.rpartition(".")[0]):
                if name in modules and name != module:
                    graph[module].add(name)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of two or more nodes that reach each other in `graph`."""
    reached = {node: reachable(graph, node) for node in graph}
    groups = set()
    for node in graph:
        group = frozenset(other for other in reached[node] if node in reached.get(other, ()))
        if group:
            groups.add(group)
    return sorted(sorted(group) for group in groups)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return the nodes that are one or more edges away from `start`."""
    found = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph.get(node, ())
    return found


def package_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Merge the modules of each package into one node; modules in dschat/ itself stay nodes."""
    rooms = {}
    for module, imported in graph.items():
        here = rooms.setdefault(module.split(".")[1], set())
        here |= {name.split(".")[1] for name in imported} - {module.split(".")[1]}
    return rooms


def package_faults(root: Path) -> list[str]:
    """Return the folders in dschat/ without __init__.py, which an installation would omit."""
    folders = {path.parent for path in (root / "dschat").rglob("*.py")}
    return [
        f"{f.relative_to(root).as_posix()}: no __init__.py"
        for f in sorted(folders)
        if not (f / "__init__.py").exists()
    ]


def sources(root: Path) -> list[Path]:
    """Return the Python files of the package and of the programs around it."""
    folders = [root / name for name in ("dschat", "training", "inference", "scripts")]
    found = [path for folder in folders for path in folder.rglob("*.py")] + list(root.glob("*.py"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def test_imports_point_down():
    assert import_faults(ROOT) == []


def test_functions_are_short():
    assert size_faults(ROOT) == []


def test_every_package_is_installed():
    assert package_faults(ROOT) == []


def test_imports_have_no_cycle():
    graph = import_graph(ROOT)
    assert cycles(graph) == []
    assert cycles(package_graph(graph)) == []


def test_unit_tests_mirror_the_packages():
    rooms = {path.name for path in (ROOT / "dschat").iterdir() if (path / "__init__.py").exists()}
    folders = {path.name for path in (ROOT / "tests" / "unit").iterdir() if path.is_dir()} - {
        "__pycache__"
    }
    assert folders - rooms == {"scripts"}
    assert rooms - folders == set()


@pytest.mark.parametrize(
    "package", ["algorithms", "config.options", "runtime.hardware", "tracking.table"]
)
def test_light_packages_load_neither_deepspeed_nor_transformers(package):
    modules = sorted(path.stem for path in (ROOT / "dschat" / "algorithms").glob("[a-z]*.py"))
    names = (
        [f"dschat.algorithms.{name}" for name in modules]
        if package == "algorithms"
        else [f"dschat.{package}"]
    )
    assert names
    heavy = "('deepspeed', 'transformers')"
    code = f"import {', '.join(names)}, sys; print(*(n for n in {heavy} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_package_loads_a_name_when_it_is_used():
    code = """
import sys
before = set(sys.modules)
import dschat
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert loaded - set(sys.stdlib_module_names) == {"dschat"}, loaded
assert set(dschat.__all__) <= set(dir(dschat))
assert issubclass(dschat.Stopped, Exception) and "torch" not in sys.modules
try:
    dschat.SFTTrainr
except AttributeError as error:
    assert "SFTTrainr" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# A file of a tree, and a part of the fault that it causes.
VIOLATIONS = {
    "upwards": ("dschat/models/a.py", "from dschat.trainers import ppo", "dschat.trainers.ppo"),
    "inside a function": (
        "dschat/models/a.py",
        "def f():\n    import dschat.engine.build",
        "dschat.engine.build",
    ),
    "relative": ("dschat/config/a.py", "from ..models import lora", "dschat.models.lora"),
    "by name": (
        "dschat/algorithms/a.py",
        "import importlib\nimportlib.import_module('dschat.config.ppo')",
        "config",
    ),
    "the whole package": ("dschat/tracking/a.py", "import dschat", "imports dschat"),
    "data in a trainer": (
        "dschat/trainers/a.py",
        "from dschat.data.loaders import make_loader",
        "data.loaders",
    ),
    "algorithms in data": (
        "dschat/data/a.py",
        "from dschat.algorithms.losses import policy_loss",
        "losses",
    ),
    "deepspeed in the decoder": (
        "dschat/generation/kernels/a.py",
        "import deepspeed",
        "only dschat/engine",
    ),
    "engine in the decoder": (
        "dschat/generation/a.py",
        "from dschat.engine import build",
        "dschat.engine",
    ),
    "deepspeed in a trainer": ("dschat/trainers/a.py", "import deepspeed", "only dschat/engine"),
    "deepspeed in a main": (
        "training/step1/main.py",
        "from deepspeed.accelerator import get_accelerator",
        "only",
    ),
    "transformers in the mathematics": (
        "dschat/algorithms/a.py",
        "import transformers",
        "torch alone",
    ),
    "a folder that is no layer": ("dschat/utils/a.py", "import os", "no layer"),
}
ALLOWED = {
    "down": (
        "dschat/trainers/a.py",
        "from dschat.engine.build import override\nfrom dschat.data.encoding import Encoder",
    ),
    "own package": (
        "dschat/models/a.py",
        "from dschat.models.lora import add_lora\nfrom . import lora",
    ),
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
def test_the_checker_allows_the_rest(case, tmp_path):
    assert import_faults(tree(tmp_path, *ALLOWED[case])) == []


def test_the_checker_sees_long_functions_and_filled_packages(tmp_path):
    tree(tmp_path, "dschat/data/function.py", "def f():\n" + "\n".join(["    x = 1"] * 76))
    tree(tmp_path, "dschat/data/__init__.py", "x = 1")
    tree(tmp_path, "dschat/data/fits.py", "def f():\n" + "\n".join(["    x = 1"] * 75))
    assert size_faults(tmp_path) == [
        "dschat/data/__init__.py: not empty",
        "dschat/data/function.py f: 76 lines, more than 75",
    ]


def test_the_checker_sees_a_cycle(tmp_path):
    tree(tmp_path, "dschat/data/a.py", "def f():\n    from dschat.models import b")
    tree(tmp_path, "dschat/models/b.py", "from dschat.models.c import d")
    tree(tmp_path, "dschat/models/c.py", "import dschat.data.a")
    tree(tmp_path, "dschat/models/e.py", "import dschat.data.a")
    graph = import_graph(tmp_path)
    assert cycles(graph) == [["dschat.data.a", "dschat.models.b", "dschat.models.c"]]
    assert cycles(package_graph(graph)) == [["data", "models"]]


def test_the_checker_sees_a_folder_without_init(tmp_path):
    tree(tmp_path, "dschat/data/__init__.py", "")
    tree(tmp_path, "dschat/data/a.py", "")
    tree(tmp_path, "dschat/models/a.py", "")
    assert package_faults(tmp_path) == ["dschat/models: no __init__.py"]
