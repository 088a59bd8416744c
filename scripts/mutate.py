"""Change one thing at a time in the mathematics, and see whether the unit tests notice.

    python scripts/mutate.py --output docs/results/mutants.json
    python scripts/mutate.py --modules dschat.generation.sampling --tests tests/unit/generation

A mutant swaps an operator, a comparison, a constant, a condition or a minimum for another, drops a
negation, or returns None. The tests are collected once. Each mutant is put into the functions of a
fork, which runs the tests that call the mutated function, the fastest first, until one fails: the
mutant is killed. Those that no test kills are listed; docs/testing.md explains those that are left.
"""

import argparse
import ast
import copy
import gc
import importlib
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import versions  # noqa: E402

ALGORITHMS = sorted(
    f"dschat.algorithms.{path.stem}"
    for path in (ROOT / "dschat" / "algorithms").glob("*.py")
    if path.stem != "__init__"
)
CPU_S = 15.0  # of a mutant, which may loop without end
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max"}
NAMES |= {"exp": "log", "log": "exp", "cumsum": "cumprod", "zeros_like": "ones_like"}


@dataclass(frozen=True)
class Mutant:
    """A changed syntax tree."""

    module: str
    line: int
    function: str  # its qualified name; "" for a module's own statements
    change: str
    tree: ast.Module


def mutants(module: str, source: str) -> Iterator[Mutant]:
    """Yield all mutants of a module."""
    tree = ast.parse(source)
    places = list(_places(tree, []))
    for number, (node, function) in enumerate(places):
        for change, apply in _changes(node):
            changed = copy.deepcopy(tree)
            target = list(_places(changed, []))[number][0]
            apply(target)
            ast.fix_missing_locations(changed)
            yield Mutant(module, node.lineno, function, change, changed)


def _places(node: ast.AST, scopes: list[str]) -> Iterator[tuple[ast.AST, str]]:
    """Yield all nodes that have a line, with the function that they are in.

    Docstrings, annotations and messages of exceptions are left out.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            inner = scopes
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = [*scopes, child.name]
            if hasattr(child, "lineno"):
                yield child, ".".join(inner)
            yield from _places(child, inner)


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    """Yield the names of the changes of a node, and the functions that make them."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        new = SWAPS.get(type(node.op))
        if new:
            yield (
                f"{type(node.op).__name__} -> {new.__name__}",
                lambda target: setattr(target, "op", new()),
            )
    elif isinstance(node, ast.Compare):
        new = SWAPS.get(type(node.ops[0]))
        if new:
            yield (
                f"{type(node.ops[0]).__name__} -> {new.__name__}",
                lambda target: setattr(target, "ops", [new(), *target.ops[1:]]),
            )
    elif isinstance(node, ast.Constant):
        new_value = _other_constant(node.value)
        if new_value is not None:
            yield (
                f"{node.value!r} -> {new_value!r}",
                lambda target: setattr(target, "value", new_value),
            )
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield f"{type(node.op).__name__} dropped", lambda target: setattr(target, "op", ast.UAdd())
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        name = NAMES[node.attr]
        yield f"{node.attr} -> {name}", lambda target: setattr(target, "attr", name)
    elif isinstance(node, ast.Name) and node.id in ("min", "max"):
        name = NAMES[node.id]
        yield f"{node.id} -> {name}", lambda target: setattr(target, "id", name)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "returns None", lambda target: setattr(target, "value", ast.Constant(None))
    elif isinstance(node, ast.If | ast.IfExp):
        yield "condition True", lambda target: setattr(target, "test", ast.Constant(True))
        yield "condition False", lambda target: setattr(target, "test", ast.Constant(False))


def _other_constant(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str) and value:
        return value + "X"
    return None


def functions_of(namespace: dict) -> dict[str, FunctionType]:
    """Return all functions that belong to a module's namespace, by qualified name."""
    return {
        found.__qualname__: found
        for found in gc.get_objects()
        if isinstance(found, FunctionType) and found.__globals__ is namespace
    }


def put_in(mutant: Mutant, module: ModuleType, live: dict[str, FunctionType]) -> None:
    """Change the functions and numbers of an imported module in place.

    Args:
        mutant: of the module.
        module: is imported.
        live: its functions, from ``functions_of``.
    """
    code: CodeType = compile(mutant.tree, str(module.__file__), "exec")
    changed = {"__name__": module.__name__, "__file__": module.__file__}
    exec(code, changed)
    for name, function in functions_of(changed).items():
        if name in live:
            live[name].__code__ = function.__code__
            live[name].__defaults__ = function.__defaults__
            live[name].__kwdefaults__ = function.__kwdefaults__
    for name, value in changed.items():
        if isinstance(value, int | float | str) and not name.startswith("__"):
            setattr(module, name, value)


class Mutations:
    """A plugin that runs the collected tests against every mutant."""

    def __init__(self, modules: list[str]):
        self.modules = {name: importlib.import_module(name) for name in modules}
        self.functions = {name: functions_of(vars(module)) for name, module in self.modules.items()}
        self.killed = 0
        self.survivors: list[Mutant] = []

    @pytest.hookimpl
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests once as they are, and then against each mutant, in forks."""
        calls, seconds = in_fork(lambda: self._calls(session.items))
        slowest_last = sorted(session.items, key=lambda item: seconds[item.nodeid])
        gc.disable()
        gc.freeze()  # so that a fork looks for new functions among few objects
        for name, module in self.modules.items():
            source = Path(str(module.__file__)).read_text(encoding="utf-8")
            for mutant in mutants(name, source):
                place = (str(module.__file__), mutant.function)
                items = [
                    item
                    for item in slowest_last
                    # Statements of the module, and methods that dataclasses generate.
                    if place in calls[item.nodeid] or mutant.function not in self.functions[name]
                ]
                if self._is_killed(mutant, module, items):
                    self.killed += 1
                else:
                    self.survivors.append(mutant)
                    print(f"{name}:{mutant.line} {mutant.function}: {mutant.change}", flush=True)
            print(f"{name}: {self.killed} killed so far", flush=True)
        return True

    def _calls(self, items: list) -> tuple[dict[str, set], dict[str, float]]:
        """Return the functions that each test calls, and its seconds."""
        files = {str(module.__file__) for module in self.modules.values()}
        calls: dict[str, set] = {}
        seconds = {}
        for item in items:
            found = calls[item.nodeid] = set()

            def note(frame, event, arg, found=found):
                if event == "call" and frame.f_code.co_filename in files:
                    found.add((frame.f_code.co_filename, _scope(frame.f_code)))

            started = time.perf_counter()
            sys.settrace(note)
            reports = runtestprotocol(item, log=False)
            sys.settrace(None)
            seconds[item.nodeid] = time.perf_counter() - started
            failed = [report for report in reports if report.failed]
            if failed:
                raise RuntimeError(f"{item.nodeid} fails without a mutant: {failed[0].longrepr}")
        return calls, seconds

    def _is_killed(self, mutant: Mutant, module: ModuleType, items: list) -> bool:
        def run() -> bool:
            try:
                put_in(mutant, module, self.functions[mutant.module])
            except Exception:  # the changed module cannot even be loaded
                return True
            return any(
                report.failed for item in items for report in runtestprotocol(item, log=False)
            )

        return in_fork(run, otherwise=True)


def _scope(code: CodeType) -> str:
    """Return the qualified name of a function without those of local functions in it."""
    return code.co_qualname.split(".<locals>")[0]


def in_fork(action: Callable, *, otherwise: object = None):
    """Return what ``action()`` returns in a fork.

    With `otherwise` the fork has CPU_S, and `otherwise` is returned if it does not end well.
    """
    readable, writable = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            if otherwise is not None:
                signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
            with os.fdopen(writable, "wb") as file:
                pickle.dump(action(), file)
            status = 0
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    if answer:
        return pickle.loads(answer)
    if otherwise is None:
        raise RuntimeError("the tests do not pass without a mutant; run them")
    return otherwise


def main() -> int:
    """Run all mutants, and print and write the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modules", nargs="+", default=ALGORITHMS)
    parser.add_argument("--tests", nargs="+", default=["tests/unit/algorithms"])
    parser.add_argument("--deselect", default="", help="an expression of pytest -k to leave out")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: only print")
    args = parser.parse_args()
    plugin = Mutations(args.modules)
    words = [*args.tests, "-q", "--noconftest", "-p", "no:cacheprovider"]
    if args.deselect:
        words += ["-k", f"not ({args.deselect})"]
    status = pytest.main(words, plugins=[plugin])
    survivors = [
        f"{mutant.module}:{mutant.line} {mutant.function}: {mutant.change}"
        for mutant in plugin.survivors
    ]
    total = plugin.killed + len(survivors)
    figures = {"mutants": total, "killed": plugin.killed, "survivors": survivors}
    print(json.dumps(figures, indent=2))
    if args.output:
        command = " ".join(["python", "scripts/mutate.py", *sys.argv[1:]])
        write_json(args.output, {"command": command, **figures, "versions": versions()})
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
