"""Checks of a model folder before a library reads it, and of its weights afterwards: libraries do not name a faulty file."""

import json
from pathlib import Path

import torch
from torch import distributed, nn

# What transformers and PEFT read as objects. tokenizer.json has many megabytes, and its reader names its faults.
OBJECTS = (
    *(
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
)


def check_objects(folder: Path, *, flag: str) -> None:
    """Check that the JSON files in `folder` are valid, and that it holds one model.

    Raises:
        ValueError: a file is damaged, or there are both a model and an adapter; names the file.
    """
    for name in OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name, flag=flag)
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{flag} {str(folder)!r} holds a model (config.json) and an adapter (adapter_config.json). Give each a folder "
            "of its own: the adapter's names the model as its base."
        )


def read_object(file: Path, *, flag: str) -> dict:
    """The JSON object in `file`; a ValueError that names it where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{flag} {str(file.parent)!r}: {file.name} is damaged: {error}. Copy it again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{flag} {str(file.parent)!r}: {file.name} holds a {type(value).__name__}, not an object. Copy it again."
        )
    return value


def shards_of(index: Path, *, flag: str) -> list[str]:
    """The files of weights that an index names, sorted.

    Raises:
        ValueError: it names none, or one outside of its folder.
    """
    found = read_object(index, flag=flag).get("weight_map")
    names = sorted(set(map(str, found.values()))) if isinstance(found, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(
            f"{flag} {str(index.parent)!r}: {index.name} has no weight_map from weights to files beside it. Copy it again."
        )
    return names


def check_finite(model: nn.Module, *, path: str, flag: str) -> None:
    """Check that every weight is finite. Reads all of them; under ZeRO-3 every rank must call it and reads its part.

    Raises:
        ValueError: names the first that is not; under ZeRO-3 on every process.
    """
    fault, in_pieces = "", False
    for name, parameter in model.named_parameters():
        in_pieces |= hasattr(parameter, "ds_tensor")
        # Both ends are finite where all between them is, and a NaN is both; forty times as fast as isfinite on a CPU.
        data = _own_part(parameter)
        if (
            data.dtype.itemsize > 1
            and data.numel()
            and not torch.stack(torch.aminmax(data)).isfinite().all()
        ):
            dtype = str(parameter.dtype).removeprefix("torch.")
            fault = (
                f"{flag} {path!r}: {name} holds values that are no finite numbers in {dtype}. Its training has diverged, or "
                "--dtype fp16 is too narrow for it: give another model, or --dtype bf16 or fp32."
            )
            break
    faults = [fault]
    if in_pieces:
        faults = [""] * distributed.get_world_size()
        distributed.all_gather_object(faults, fault)
    if any(faults):
        raise ValueError(next(filter(None, faults)))


def _own_part(parameter: nn.Parameter) -> torch.Tensor:
    """The values of a parameter that this process holds; without what ZeRO-3 pads its parts with, which is never set."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    left = parameter.ds_numel - distributed.get_rank() * part.ds_numel
    return part.detach().flatten()[: max(0, min(part.ds_numel, left))]
