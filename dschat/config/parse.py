"""Parse flags, or one YAML or JSON file, into the configuration of a step."""

import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from dschat.config.value_checks import integers_in_64_bits, usable_text

# DeepSpeed-Chat's names of step 3 before its batch flags were renamed.
OLD_NAMES = {
    "--per_device_train_batch_size": "--per_device_generation_batch_size",
    "--per_device_mini_train_batch_size": "--per_device_training_batch_size",
    "--generation_batch_numbers": "--generation_batches",
}
FILE_SUFFIXES = (".yaml", ".yml", ".json")


class _Parser(HfArgumentParser):
    """An argument parser that raises a ValueError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`."""
        raise ValueError(message)


def parse_config(config_class: Any, argv: list[str] | None = None) -> Any:
    """Parse and check the configuration in command-line words, or in the one file that they name.

    Args:
        config_class: a dataclass of option groups with a method ``problems() -> list[str]``.
        argv: the words after the program's name; default ``sys.argv[1:]``.

    Returns:
        An instance of `config_class`.

    Raises:
        ValueError: the configuration is bad. The message lists every problem, one per line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = typing.get_type_hints(config_class)
    parser = _Parser(
        list(groups.values()),
        description=config_class.__doc__,
        epilog="--config FILE reads flags from a YAML or JSON file; those beside it win.",
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # a list may be empty, as in DeepSpeed-Chat
    title = step_title(config_class)
    # The launcher puts --local_rank between the script's name and the user's words.
    words = [word for word in argv if not word.startswith("--local_rank=")]
    if len(words) == 1 and words[0].endswith(FILE_SUFFIXES):
        values = _from_file(parser, Path(words[0]), title)
    else:
        values = _from_flags(parser, _with_config_file(parser, argv, title), title)
    config = config_class(**dict(zip(groups, values, strict=True)))
    check_config(config)
    return config


def check_config(config: Any) -> None:
    """Check a configuration whose values have the right types.

    Raises:
        ValueError: it is bad. The message lists every problem, one per line.
    """
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    problems = config.problems()
    for group in values:
        if hasattr(group, "problems"):
            problems += group.problems()
    for group in values:
        # A check of the flag itself says more.
        problems += [
            problem
            for problem in integers_in_64_bits(group)
            if not any(other.startswith(problem.split(" ")[0] + " ") for other in problems)
        ]
    if problems:
        raise ValueError("\n".join(problems))


def step_title(config_class: type) -> str:
    """Return the name of a step, such as "Step 2, reward model"."""
    return (config_class.__doc__ or "").split("\n")[0].rstrip(".")


def config_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as one flat dictionary, like a YAML file for the same run."""
    return _flat(getattr(config, field.name) for field in dataclasses.fields(config))


def default_dict(config: Any) -> dict[str, Any]:
    """Return the defaults of all flags of a configuration, as ``config_dict`` returns values."""
    groups = (getattr(config, field.name) for field in dataclasses.fields(config))
    return _flat(type(group)() for group in groups)


def _flat(groups: Iterable[Any]) -> dict[str, Any]:
    """Return the options of all groups as one dictionary."""
    flat: dict[str, Any] = {}
    for group in groups:
        flat.update(dataclasses.asdict(group))
    return flat


def _from_flags(parser: _Parser, argv: list[str], title: str) -> list[Any]:
    known = set(parser._option_string_actions)
    step3 = "--per_device_training_batch_size" in known
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if step3:
            name = OLD_NAMES.get(name, name)
        words.append(name + equals + value)
    problems = _unusable(words)
    if problems:
        raise ValueError("\n".join(problems))
    *values, rest = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        # Words after an unknown flag are its values.
        unknown = [word for word in rest if word.startswith("--")] or rest
        raise ValueError("\n".join(_unknown(word, words, known, title) for word in unknown))
    return list(values)


def _unusable(words: list[str]) -> list[str]:
    """Return the problems of the words that cannot be the value of any flag."""
    found = []
    flag = ""
    for word in words:
        value = word
        if word.startswith("--") and word != "--":
            flag, _, value = word.partition("=")
        found += usable_text(flag, value)
    return found


def _unknown(word: str, words: list[str], known: set[str], title: str) -> str:
    before = words[words.index(word) - 1] if word in words[1:] else ""
    if not word.startswith("--") and word.startswith("-") and before in known:
        return f"{before} {word}: write a value that begins with - as {before}={word}"
    if word.endswith(FILE_SUFFIXES):
        return (
            f"{word}: a configuration file takes no flags beside it. Write them into the file, or "
            f"give --config {word}."
        )
    near = difflib.get_close_matches(word.partition("=")[0], sorted(known), n=1)
    hint = f" Did you mean {near[0]}?" if near else " --help lists the flags."
    return f"{word}: no flag of that name ({title}).{hint}"


def _with_config_file(parser: _Parser, argv: list[str], title: str) -> list[str]:
    """Replace --config FILE by the flags in the file, before all others, which therefore win.

    Raises:
        ValueError: the file is bad, has no name, or is given twice.
    """
    rest: list[str] = []
    files: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            files.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    if not files:
        return argv
    if len(files) > 1:
        raise ValueError(f"--config is given {len(files)} times: give one file.")
    if not files[0] or files[0].startswith("--"):
        raise ValueError("--config has no value: give a YAML or JSON file.")
    path = Path(files[0])
    found = _file_words(path)
    _named_faults(path, parser, found, title)
    return found + rest


def _from_file(parser: _Parser, path: Path, title: str) -> list[Any]:
    return _named_faults(path, parser, _file_words(path), title)


def _named_faults(path: Path, parser: _Parser, words: list[str], title: str) -> list[Any]:
    """Parse the words of a file; its name is in every message."""
    try:
        return _from_flags(parser, words, title)
    except ValueError as error:
        raise ValueError(
            "\n".join(f"{path}: {line}" for line in str(error).splitlines())
        ) from error


def _file_words(path: Path) -> list[str]:
    """Return the flags in a YAML or JSON file, as command-line words."""
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # PyYAML raises a ValueError for a bad date
        raise ValueError(f"{path}: not readable as {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected flag names and values, found {type(values).__name__}.")
    # Values are parsed as flags: "5e-5", a string to YAML, becomes a number, and a wrong type is an
    # error.
    words = []
    for key, value in values.items():
        if value is None:
            continue
        words.append(f"--{key}")
        words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words
