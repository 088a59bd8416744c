"""Checks of the weights that from_pretrained read, and changes of partitioned weights."""

import contextlib
import pickle
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel


@contextlib.contextmanager
def refuse_damaged_weights(path: str, *, flag: str) -> Iterator[None]:
    """Turn the errors of reading weight files in this context into one ValueError.

    Raises:
        ValueError: a file is damaged, or holds more than tensors, and might run code when read.
    """
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "PytorchStreamReader|zip archive", str(error)
        ):
            raise
        reason = f"{type(error).__name__}: " + str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{flag} {path!r}: its weights cannot be read ({reason}). A file is damaged, or a .bin "
            "holds more than tensors, which is refused. Give a whole copy, with safetensors if "
            "available."
        ) from error


def first_names(names: Iterable[str], count: int = 8) -> str:
    """Return the first `count` of `names`, sorted, as one line, with the number of the rest."""
    names = sorted(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def require_complete(
    model: PreTrainedModel,
    info: dict,
    *,
    path: str,
    flag: str,
    fresh: Iterable[str] = (),
    left_over: Iterable[str] = (),
) -> None:
    """Check that every weight of `model` but those in `fresh` came from the checkpoint.

    transformers only warns, and initialises weights at random that are missing or of another shape.

    Args:
        model: the loaded model.
        info: the loading info of from_pretrained.
        path: the model as the user gave it, for messages.
        flag: the command-line flag that `path` came from, for messages.
        fresh: names of weights that may be newly initialised.
        left_over: names in the checkpoint that the model has no place for, if that is an error.

    Raises:
        ValueError: weights are missing, of another shape or left over; names all kinds at once.
    """
    mismatched = {name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]}
    faults = {
        "missing": set(info["missing_keys"]) - set(fresh),
        "of another shape": mismatched,
        "not part of the model": set(left_over),
    }
    found = "; ".join(f"{what}: {first_names(names)}" for what, names in faults.items() if names)
    if found:
        raise ValueError(
            f"{flag} {path!r} does not hold the weights of a {type(model).__name__} ({found}). "
            "Check that config.json and the weights belong together and are of the right kind of "
            "model."
        )


def update_weight(weight: torch.Tensor, compute: Callable[..., torch.Tensor]) -> None:
    """Copy `compute(weight)` into a parameter, whole or partitioned; all ranks compute the same."""
    is_partitioned = hasattr(weight, "ds_id")
    if is_partitioned:
        weight.all_gather()
    with torch.no_grad():
        weight.copy_(compute(weight.detach()))
    if is_partitioned:
        weight.partition(has_been_updated=True)
