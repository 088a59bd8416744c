"""LoRA adapters as folders of PEFT: written beside a merged model, and merged into a base model that is loaded."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.models.lora import ADAPTER, lora_parameter_names
from dschat.models.structure import pretrained
from dschat.models.weights import readable_weights

ADAPTER_FOLDER = "adapter"  # in the folder of the merged model
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in PEFT's files
HEAD = "score"


def adapter_is_all(model: nn.Module) -> bool:
    """Return whether only adapters and a new head train, so that an adapter folder holds the whole result."""
    inner = pretrained(model)
    names = {name for name, p in inner.named_parameters() if p.requires_grad}
    lora = lora_parameter_names(inner)
    return bool(lora) and names <= lora | {f"{HEAD}.weight"}


def write_adapter(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write the adapters of `model` (and a reward model's head) to the folder `path`, for PeftModel.from_pretrained.

    Args:
        model: a transformers model; its names and adapters' sizes are read, not its parameters.
        tensors: its whole tensors on the CPU, by the names of `model`.state_dict().
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    first = next(iter(layers.values()))
    found = {
        name.replace(f".{ADAPTER}.", "."): tensors[name] for name in lora_parameter_names(model)
    }
    is_reward = f"{HEAD}.weight" in tensors
    if is_reward:
        found[f"{HEAD}.weight"] = tensors[f"{HEAD}.weight"]
    config = LoraConfig(
        r=first.r[ADAPTER],
        lora_alpha=first.lora_alpha[ADAPTER],
        target_modules=sorted(layers),
        fan_in_fan_out=first.fan_in_fan_out,
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        modules_to_save=[HEAD] if is_reward else None,
        base_model_name_or_path=model.name_or_path,
        inference_mode=True,
    )
    path.mkdir()
    config.save_pretrained(path)
    save_file(
        {PREFIX + name: tensor.contiguous() for name, tensor in found.items()}, path / WEIGHTS
    )


def adapter_has_head(folder: str | Path, *, flag: str) -> bool:
    """Return whether an adapter folder holds a reward model's head; a ValueError if its weights are damaged."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return False
    with readable_weights(str(folder), flag=flag), safe_open(path, framework="pt") as file:
        return f"{PREFIX}{HEAD}.weight" in file.keys()


def merge_adapter(model: nn.Module, folder: str | Path, *, flag: str) -> int:
    """Add the LoRA adapter in `folder` to the weights of `model`, each sum rounded once, and take over its head.

    Works on weights that ZeRO-3 holds in pieces; every process must call it.

    Args:
        model: a transformers model without adapters, the adapter's base.
        flag: the command-line flag that `folder` came from, for messages.

    Returns:
        The number of layers changed.

    Raises:
        ValueError: no LoRA adapter, one of a kind that cannot be merged here, or one of another model.
    """
    folder = Path(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (
        Exception
    ) as error:  # unknown kinds and values that make no sense raise any of many kinds
        raise ValueError(
            f"{flag} {str(folder)!r}: adapter_config.json cannot be used: {error!r}"
        ) from error
    _check_kind(config, folder, flag=flag)
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    with (
        readable_weights(str(folder), flag=flag),
        safe_open(folder / WEIGHTS, framework="pt") as file,
    ):
        for key in file.keys():
            layer, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            deltas.setdefault(layer or kind, {})[kind if layer else "whole"] = file.get_tensor(key)
    modules = dict(model.named_modules())
    strange = sorted(
        name for name, parts in deltas.items() if not _fits(modules.get(name), name, parts)
    )
    if strange:
        raise ValueError(
            f"{flag} {str(folder)!r}: {type(model).__name__} has no place for {', '.join(strange[:4])} of this adapter. "
            "Give the adapter of this base model, or merge it into a model folder by PEFT first."
        )
    for name, parts in deltas.items():
        weight = modules[name].weight
        if "whole" in parts:
            _change(weight, lambda old, new=parts["whole"]: new)
            continue
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha
        )
        dim = parts["lora_A"].shape[0]
        update = (
            alpha
            / (dim**0.5 if config.use_rslora else dim)
            * (parts["lora_B"].float() @ parts["lora_A"].float())
        )
        update = update.T if isinstance(modules[name], Conv1D) else update
        _change(weight, lambda old, update=update: old.float() + update.to(old.device))
    return len(deltas)


def _fits(module: nn.Module | None, name: str, parts: dict[str, torch.Tensor]) -> bool:
    """Return whether `parts` are the head of `module` or an adapter for its weight."""
    if set(parts) != ({"whole"} if name == HEAD else {"lora_A", "lora_B"}) or not hasattr(
        module, "weight"
    ):
        return False
    shape = tuple(
        getattr(module.weight, "ds_shape", module.weight.shape)
    )  # under ZeRO-3 of the whole weight
    if name == HEAD:
        return tuple(parts["whole"].shape) == shape
    a, b = parts["lora_A"], parts["lora_B"]
    if a.dim() != 2 or b.dim() != 2 or not 0 < a.shape[0] == b.shape[1]:
        return False
    return (b.shape[0], a.shape[1]) == (shape[::-1] if isinstance(module, Conv1D) else shape)


def _check_kind(config: PeftConfig, folder: Path, *, flag: str) -> None:
    faults = []
    if not isinstance(config, LoraConfig):
        faults.append(f"its kind is {config.peft_type}, not LoRA")
    elif config.use_dora or config.bias != "none":
        faults.append("it has DoRA or biases")
    elif str(config.init_lora_weights).startswith(("pissa", "olora", "corda", "loftq")):
        faults.append(
            f"its start ({config.init_lora_weights}) changes the weights of the base, which merging would have to repeat"
        )
    if not (folder / WEIGHTS).is_file():
        faults.append(f"{WEIGHTS} is missing")
    if faults:
        raise ValueError(
            f"{flag} {str(folder)!r} is an adapter that cannot be merged here: {'; '.join(faults)}. Merge it into a "
            "model folder by PEFT first (merge_and_unload, save_pretrained)."
        )


def _change(weight: torch.Tensor, change) -> None:
    """Put `change(weight)` into a parameter, whole or in pieces; all processes put the same."""
    in_pieces = hasattr(weight, "ds_id")
    if in_pieces:
        weight.all_gather()
    with torch.no_grad():
        weight.copy_(change(weight.detach()))
    if in_pieces:
        weight.partition(has_been_updated=True)
