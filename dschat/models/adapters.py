"""LoRA adapter folders in PEFT's format: writing one, and merging one into a loaded base model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dschat.models.lora import (
    ADAPTER,
    adapted_layer_names,
    adapted_name,
    expert_adapters,
    expert_product,
    has_outputs_first,
    lora_layers,
    lora_parameter_names,
    plain_name,
)
from dschat.models.structure import SCORE_HEAD, expert_names, pretrained
from dschat.models.weights import refuse_damaged_weights, update_weight

ADAPTER_FOLDER = "adapter"  # inside the folder of the merged model
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in PEFT's files
HEAD_WEIGHT = f"{SCORE_HEAD}.weight"
# Initialisations that change the base weights; such an adapter does not fit the published base.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")


def trains_only_adapters(model: nn.Module) -> bool:
    """Return whether only adapters and a new head train, so that an adapter folder is complete."""
    inner = pretrained(model)
    trainable = {name for name, p in inner.named_parameters() if p.requires_grad}
    lora = lora_parameter_names(inner)
    return bool(lora) and trainable <= lora | {HEAD_WEIGHT}


def write_adapter(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write the adapters of `model`, and a reward model's head, for PeftModel.from_pretrained.

    Args:
        model: a transformers model; its names and adapters' sizes are read, not its parameters.
        tensors: its whole tensors on the CPU, by the names of `model`.state_dict().
        path: the folder to create.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    saved = {
        name.replace(f".{ADAPTER}.", "."): tensors[name] for name in lora_parameter_names(model)
    }
    is_reward = HEAD_WEIGHT in tensors
    if is_reward:
        saved[HEAD_WEIGHT] = tensors[HEAD_WEIGHT]
    config = LoraConfig(
        r=first.r[ADAPTER],
        lora_alpha=first.lora_alpha[ADAPTER],
        target_modules=sorted(plain_name(name) for name in adapted_layer_names(model)),
        target_parameters=_adapted_experts(model),
        use_rslora=first.use_rslora[ADAPTER],
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        modules_to_save=[SCORE_HEAD] if is_reward else None,
        base_model_name_or_path=model.name_or_path,
        inference_mode=True,
    )
    path.mkdir()
    config.save_pretrained(path)
    weights = {PREFIX + name: tensor.contiguous() for name, tensor in saved.items()}
    save_file(weights, path / WEIGHTS_FILE)


def _adapted_experts(model: nn.Module) -> list[str] | None:
    """Return the names of the experts' parameters that have adapters; None if there are none."""
    experts = {id(layer) for layer in expert_adapters(model)}
    layers = lora_layers(model).items()
    return (
        sorted(adapted_name(name, layer) for name, layer in layers if id(layer) in experts) or None
    )


def adapter_has_head(folder: str | Path, *, flag: str) -> bool:
    """Return whether an adapter folder holds a reward model's head.

    Raises:
        ValueError: its weights are damaged.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return False
    with refuse_damaged_weights(str(folder), flag=flag), safe_open(path, framework="pt") as file:
        return PREFIX + HEAD_WEIGHT in file.keys()


def merge_adapter(model: nn.Module, folder: str | Path, *, flag: str) -> int:
    """Merge the LoRA adapter in `folder` into `model`, in place, and take its head if it has one.

    Each sum is rounded once. Weights may be partitioned by ZeRO-3; every rank must call this.

    Args:
        model: a transformers model without adapters, the adapter's base.
        folder: an adapter folder as PEFT writes it.
        flag: the command-line flag that `folder` came from, for messages.

    Returns:
        The number of layers changed.

    Raises:
        ValueError: no LoRA adapter, one of a kind that cannot be merged here, or one of another
            model.
    """
    folder = Path(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises many kinds for unknown types and invalid values
        raise ValueError(
            f"{flag} {str(folder)!r}: adapter_config.json cannot be used: {error!r}"
        ) from error
    _check_kind(config, folder, flag=flag)
    layers = _read_weights(folder, flag=flag)
    places = _places(model, config)
    unmatched = sorted(
        name for name, parts in layers.items() if not _fits(places.get(name), name, parts)
    )
    if unmatched:
        raise ValueError(
            f"{flag} {str(folder)!r}: {type(model).__name__} has no place for "
            f"{', '.join(unmatched[:4])} of this adapter. Give the adapter of this base model, or "
            "merge it into a model folder by PEFT first."
        )
    for name, parts in layers.items():
        if "whole" in parts:
            update_weight(places[name].weight, lambda old, new=parts["whole"]: new)
            continue
        update = _update(config, name, places[name], parts)
        update_weight(
            places[name].weight, lambda old, update=update: old.float() + update.to(old.device)
        )
    return len(layers)


@dataclass(frozen=True)
class Place:
    """A weight of the base model that an adapter can change.

    Attributes:
        module: the module that holds the weight.
        leaf: the weight's name in it.
        is_stacked: it holds the weights of experts.
    """

    module: nn.Module
    leaf: str = "weight"
    is_stacked: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """The weight, which ZeRO-3 may have partitioned."""
        return getattr(self.module, self.leaf)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""
        return tuple(getattr(self.weight, "ds_shape", self.weight.shape))


def _places(model: nn.Module, config: LoraConfig) -> dict[str, Place]:
    """Return the weights that adapters may change by the names of their layers in a file of PEFT.

    PEFT wraps a module of experts once for each of the parameters that it adapts, in the order of
    their definition: the first one is the innermost.
    """
    modules = dict(model.named_modules())
    places = {name: Place(module) for name, module in modules.items() if hasattr(module, "weight")}
    targets = [f".{target}" for target in config.target_parameters or ()]
    wrapped: dict[str, list[str]] = {}
    for parameter in expert_names(model):
        if any(f".{parameter}".endswith(target) for target in targets):
            name, _, leaf = parameter.rpartition(".")
            wrapped.setdefault(name, []).append(leaf)
    for name, leaves in wrapped.items():
        for depth, leaf in enumerate(reversed(leaves)):
            places[name + ".base_layer" * depth] = Place(modules[name], leaf, is_stacked=True)
    return places


def _update(
    config: LoraConfig, name: str, place: Place, parts: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return what an adapter adds to the weight at `place`, in fp32."""
    a, b = parts["lora_A"].float(), parts["lora_B"].float()
    if place.is_stacked:
        dim = a.shape[0] // place.shape[0]
        scale = _scale(config, f"{plain_name(name)}.{place.leaf}", dim=dim)
        outputs_first = has_outputs_first(place.module)
        return scale * expert_product(a, b, shape=place.shape, outputs_first=outputs_first)
    update = _scale(config, name, dim=a.shape[0]) * (b @ a)
    return update.T if isinstance(place.module, Conv1D) else update


def _read_weights(folder: Path, *, flag: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors by layer, then by "lora_A" and "lora_B", or "whole" for a head."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    with (
        refuse_damaged_weights(str(folder), flag=flag),
        safe_open(folder / WEIGHTS_FILE, framework="pt") as file,
    ):
        for key in file.keys():
            layer, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if layer:
                layers.setdefault(layer, {})[kind] = file.get_tensor(key)
            else:
                layers.setdefault(kind, {})["whole"] = file.get_tensor(key)
    return layers


def _scale(config: LoraConfig, name: str, *, dim: int) -> float:
    """Return the factor of B A in the layer `name`."""
    key = get_pattern_key(config.alpha_pattern.keys(), name)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha / (dim**0.5 if config.use_rslora else dim)


def _fits(place: Place | None, name: str, parts: dict[str, torch.Tensor]) -> bool:
    """Return whether `parts` are the head at `place` or an adapter for its weight."""
    expected = {"whole"} if name == SCORE_HEAD else {"lora_A", "lora_B"}
    if set(parts) != expected or place is None:
        return False
    if name == SCORE_HEAD:
        return tuple(parts["whole"].shape) == place.shape
    a = parts["lora_A"]
    b = parts["lora_B"]
    if a.dim() != 2 or b.dim() != 2 or not 0 < a.shape[0] == b.shape[1]:
        return False
    if not place.is_stacked:
        is_transposed = isinstance(place.module, Conv1D)
    else:
        is_transposed = not has_outputs_first(place.module)
        if a.shape[0] % place.shape[0]:
            return False
    shape = place.shape[-2:]
    return (b.shape[0], a.shape[1]) == (shape[::-1] if is_transposed else shape)


def _check_kind(config: PeftConfig, folder: Path, *, flag: str) -> None:
    """Raise a ValueError unless the adapter is one that ``merge_adapter`` can merge."""
    faults = []
    if not isinstance(config, LoraConfig):
        faults.append(f"its kind is {config.peft_type}, not LoRA")
    elif config.use_dora or config.bias != "none":
        faults.append("it has DoRA or biases")
    elif str(config.init_lora_weights).startswith(BASE_CHANGING_STARTS):
        faults.append(
            f"its start ({config.init_lora_weights}) changes the weights of the base, which "
            "merging would have to repeat"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        faults.append(f"{WEIGHTS_FILE} is missing")
    if faults:
        raise ValueError(
            f"{flag} {str(folder)!r} is an adapter that cannot be merged here: "
            f"{'; '.join(faults)}. Merge it into a model folder by PEFT first (merge_and_unload, "
            "save_pretrained)."
        )
