"""The functions, classes and graders that --reward_fn names, and how they are called."""

import asyncio
import importlib.util
import inspect
import re
from collections.abc import Callable
from typing import Any

from dschat.config.ppo_options import GRADER, OBJECT_PREFIX
from dschat.rewards.registry import load_grader
from dschat.runtime.paths import user_path


def is_grader(name: str) -> bool:
    """Return whether a value of --reward_fn names a grader, and not "file.py:function"."""
    return re.fullmatch(GRADER, name, re.DOTALL) is not None


def load_function(name: str) -> Callable:
    """Load the function that `name`, "file.py:function", names, or the grader of this name.

    If `name` names a class, return an object of it, made without arguments.

    Raises:
        ValueError: there is no such file, function or grader, or running the file or making the
            object fails; names --reward_fn.
    """
    if is_grader(name):
        try:
            return load_grader(name)
        except ValueError as error:
            raise ValueError(f"--reward_fn {name}: {error}") from error
    if name.startswith(OBJECT_PREFIX):
        raise ValueError(
            f"--reward_fn {name}: this names a Python object that was given to PPOTrainer. Give "
            "the object again, or file.py:function."
        )
    file, _, function = name.rpartition(":")
    path = user_path(file)
    if not path.is_file():
        raise ValueError(f"--reward_fn {name}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--reward_fn {name}: {path} does not run: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if inspect.isclass(found):
        found = _new_object(found, name)
    if not callable(found):
        raise ValueError(f"--reward_fn {name}: {path} has no function {function}.")
    return found


def _new_object(found: type, name: str) -> Any:
    """Return an object of a class, which must be callable."""
    try:
        made = found()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--reward_fn {name}: making a {found.__name__} without arguments fails: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(made):
        raise ValueError(f"--reward_fn {name}: {found.__name__} has no method __call__.")
    return made


class Caller:
    """Calls of one reward function, which may be async.

    Awaitables run in one event loop, so that an async function can keep its connections.
    """

    def __init__(self, function: Callable):
        """Set the function."""
        self.function = function
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, prompts: list[str], answers: list[str], columns: dict[str, list]) -> Any:
        """Return the scores, each as a number, None or a mistake, if there is a list of them."""
        scores = self.function(prompts, answers, **columns)
        if inspect.isawaitable(scores):
            self._loop = self._loop or asyncio.new_event_loop()
            scores = self._loop.run_until_complete(_wait_for(scores))
        if hasattr(scores, "tolist"):  # an array or a tensor
            scores = scores.tolist()
        if not isinstance(scores, (list, tuple)):
            return scores
        return [plain_number(score) for score in scores]


async def _wait_for(scores: Any) -> Any:
    return await scores


def plain_number(score: Any) -> Any:
    """Return a scalar of numpy or torch as Python's number, and anything else as it is."""
    is_scalar = hasattr(score, "item") and getattr(score, "shape", None) in ((), (1,))
    return score.item() if is_scalar else score
