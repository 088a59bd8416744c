"""Checks of a model folder before it is loaded, and of its weights afterwards.

The libraries that read these files do not name the one that is damaged.
"""

import json
from pathlib import Path

import torch
from torch import distributed, nn

# Files that transformers and PEFT read as JSON objects. Not tokenizer.json: it has many megabytes,
# and its reader names its faults.
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def check_json_files(folder: Path, *, flag: str) -> None:
    """Check that the JSON files in `folder` are valid, and that it holds one model.

    Raises:
        ValueError: a file is damaged, or there are both a model and an adapter; names the file.
    """
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json_object(folder / name, flag=flag)
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{flag} {str(folder)!r} holds a model (config.json) and an adapter "
            "(adapter_config.json). Give each a separate folder: the adapter names the model as "
            "its base."
        )


def read_json_object(file: Path, *, flag: str) -> dict:
    """Return the JSON object in `file`.

    Raises:
        ValueError: the file is damaged or holds something else; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{flag} {str(file.parent)!r}: {file.name} is damaged: {error}. Copy it again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{flag} {str(file.parent)!r}: {file.name} holds a {type(value).__name__}, not an "
            "object. Copy it again."
        )
    return value


def shard_names(index: Path, *, flag: str) -> list[str]:
    """Return the sorted names of the weight files in an index.

    Raises:
        ValueError: it names none, or one outside its folder.
    """
    found = read_json_object(index, flag=flag).get("weight_map")
    names = sorted(set(map(str, found.values()))) if isinstance(found, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(
            f"{flag} {str(index.parent)!r}: {index.name} has no weight_map from weights to files "
            "in its folder. Copy it again."
        )
    return names


def check_finite(model: nn.Module, *, path: str, flag: str) -> None:
    """Check that every weight is finite.

    This reads all weights. Under ZeRO-3 every rank must call it, and reads its part.

    Raises:
        ValueError: a weight is not finite; names the first, under ZeRO-3 on every rank.
    """
    fault = ""
    is_partitioned = False
    for name, parameter in model.named_parameters():
        is_partitioned |= hasattr(parameter, "ds_tensor")
        if not _is_finite(_local_values(parameter)):
            dtype = str(parameter.dtype).removeprefix("torch.")
            fault = (
                f"{flag} {path!r}: {name} holds values that are no finite numbers in {dtype}. Its "
                "training has diverged, or --dtype fp16 is too narrow for it: give another model, "
                "or --dtype bf16 or fp32."
            )
            break
    faults = [fault]
    if is_partitioned:
        faults = [""] * distributed.get_world_size()
        distributed.all_gather_object(faults, fault)
    if any(faults):
        raise ValueError(next(filter(None, faults)))


def _is_finite(data: torch.Tensor) -> bool:
    """Return whether all values are finite; types of one byte are not checked."""
    if data.dtype.itemsize == 1 or not data.numel():
        return True
    # All values are finite if minimum and maximum are, and a NaN is both. This is forty times as
    # fast as isfinite on a CPU.
    return bool(torch.stack(torch.aminmax(data)).isfinite().all())


def _local_values(parameter: nn.Parameter) -> torch.Tensor:
    """Return this rank's values of a parameter, without ZeRO-3's uninitialised padding."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    left = parameter.ds_numel - distributed.get_rank() * part.ds_numel
    return part.detach().flatten()[: max(0, min(part.ds_numel, left))]
