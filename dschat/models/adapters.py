"""LoRA adapter folders in PEFT's format: writing one, and merging one into a loaded base model."""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
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
from dschat.models.new_tokens import CHILD, new_token_modules
from dschat.models.structure import SCORE_HEAD, expert_names, pretrained
from dschat.models.vocabulary import embedding_rows, grow_vocabulary
from dschat.models.weights import refuse_damaged_weights, update_weight

ADAPTER_FOLDER = "adapter"  # inside the folder of the merged model
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in PEFT's files
HEAD_WEIGHT = f"{SCORE_HEAD}.weight"
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # of PEFT's names of rows of tokens
# Initialisations that change the base weights; such an adapter does not fit the published base.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq")


@dataclass
class AdapterTensors:
    """The tensors of an adapter folder, by the names of the base model."""

    lora: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # layer: lora_A, lora_B
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # module: rows of some tokens
    whole: dict[str, torch.Tensor] = field(default_factory=dict)  # parameter: its new value


def trains_only_adapters(model: nn.Module) -> bool:
    """Return whether an adapter folder holds all that trains.

    It holds adapters, a new head, rows of new tokens and the modules of --modules_to_save.
    """
    inner = pretrained(model)
    trainable = {name for name, p in inner.named_parameters() if p.requires_grad}
    held = lora_parameter_names(inner) | {HEAD_WEIGHT} | set(_saved_parameters(inner))
    return bool(lora_layers(inner)) and trainable <= held


def _saved_parameters(model: nn.Module) -> list[str]:
    """Return the parameters of --modules_to_save by all their names: tied ones have two."""
    ids = {
        id(parameter)
        for name in getattr(model, "modules_to_save", [])
        for parameter in model.get_submodule(name).parameters(recurse=False)
    }
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in ids]


def write_adapter(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write what trained in `model`, see ``trains_only_adapters``, for PeftModel.from_pretrained.

    Args:
        model: a transformers model; its names and adapters' sizes are read, not its parameters.
        tensors: its whole tensors on the CPU, by the names of `model`.state_dict().
        path: the folder to create.
        tokenizer: saved into the folder, since it may have more tokens than the base's.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    saved = {}
    indices = {}
    for name, tokens in new_token_modules(model):
        ids = tokens.ids.cpu()
        rows = tensors[f"{name}.weight"][ids]
        change = tensors[f"{name}.{CHILD}.delta"]
        saved[f"{name}{ROWS_SUFFIX}"] = (rows.float() + change.float()).to(rows.dtype)
        indices[name.rpartition(".")[2]] = ids.tolist()
    for name in lora_parameter_names(model):
        if ".lora_" in name:
            saved[name.replace(f".{ADAPTER}.", ".")] = tensors[name]
    whole = [*_saved_parameters(model), *([HEAD_WEIGHT] if HEAD_WEIGHT in tensors else [])]
    saved |= {name: tensors[name] for name in whole}
    config = LoraConfig(
        r=first.r[ADAPTER],
        lora_alpha=first.lora_alpha[ADAPTER],
        target_modules=sorted(plain_name(name) for name in adapted_layer_names(model)),
        target_parameters=_adapted_experts(model),
        use_rslora=first.use_rslora[ADAPTER],
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        task_type="SEQ_CLS" if HEAD_WEIGHT in tensors else "CAUSAL_LM",
        modules_to_save=list(dict.fromkeys(name.rpartition(".")[0] for name in whole)) or None,
        trainable_token_indices=indices or None,
        base_model_name_or_path=model.name_or_path,
        inference_mode=True,
    )
    path.mkdir()
    config.save_pretrained(path)
    # Tied parameters share their storage, which safetensors refuses.
    weights = {PREFIX + name: tensor.clone().contiguous() for name, tensor in saved.items()}
    save_file(weights, path / WEIGHTS_FILE)
    tokenizer.save_pretrained(path)


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
    """Merge the LoRA adapter in `folder` into `model`, in place, with all else that it holds.

    That may be a reward model's head, modules that were trained whole, and rows of tokens. The
    vocabulary grows to the adapter's. Each sum is rounded once. Weights may be partitioned by
    ZeRO-3; every rank must call this.

    Args:
        model: a transformers model without adapters, the adapter's base.
        folder: an adapter folder as PEFT writes it.
        flag: the command-line flag that `folder` came from, for messages.

    Returns:
        The number of tokens that have trained rows: those of the model or of the adapter.

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
    found = _read_weights(folder, flag=flag)
    places = _places(model, config)
    token_ids = {name: _token_ids(config, name) for name in found.rows}
    _check_places(model, found, places, token_ids, folder=folder, flag=flag)
    trained_rows = max(embedding_rows(model), _rows_needed(model, found, token_ids))
    grow_vocabulary(model, trained_rows)
    for name, new in found.whole.items():
        update_weight(model.get_parameter(name), partial(_with_first_rows, new=new))
    for name, new in found.rows.items():
        ids = torch.tensor(token_ids[name])
        update_weight(model.get_submodule(name).weight, partial(_with_rows, ids=ids, new=new))
    for name, parts in found.lora.items():
        update = _update(config, name, places[name], parts)
        update_weight(
            places[name].weight, lambda old, update=update: old.float() + update.to(old.device)
        )
    return trained_rows


def _with_first_rows(old: torch.Tensor, *, new: torch.Tensor) -> torch.Tensor:
    """Return `old` with `new` as its first rows: padding of a vocabulary is not in an adapter."""
    return torch.cat([new.to(old), old[len(new) :]])


def _with_rows(old: torch.Tensor, *, ids: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return old.index_copy(0, ids.to(old.device), new.to(old))


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


def _read_weights(folder: Path, *, flag: str) -> AdapterTensors:
    found = AdapterTensors()
    with (
        refuse_damaged_weights(str(folder), flag=flag),
        safe_open(folder / WEIGHTS_FILE, framework="pt") as file,
    ):
        for key in file.keys():
            # If a vocabulary has grown, PEFT writes modules_to_save again under wrapped names.
            if ".original_module." in key or ".modules_to_save." in key:
                continue
            name = key.removeprefix(PREFIX)
            tensor = file.get_tensor(key)
            lora = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name)
            if lora:
                found.lora.setdefault(lora[1], {})[lora[2]] = tensor
            elif name.endswith(ROWS_SUFFIX):
                found.rows[name.removesuffix(ROWS_SUFFIX)] = tensor
            else:
                found.whole[name] = tensor
    return found


def _token_ids(config: LoraConfig, name: str) -> list[int]:
    """Return the ids of an adapter's rows of the module `name`; empty if it does not say."""
    indices = config.trainable_token_indices or []
    if isinstance(indices, list):
        return indices
    return next((ids for key, ids in indices.items() if f".{name}".endswith(f".{key}")), [])


def _rows_needed(model: nn.Module, found: AdapterTensors, token_ids: dict[str, list[int]]) -> int:
    """Return the number of tokens that an adapter's embedding or rows are for."""
    embedding = model.get_input_embeddings().weight
    whole = [
        len(tensor)
        for name, tensor in found.whole.items()
        if model.get_parameter(name) is embedding
    ]
    return max(*whole, *(max(ids) + 1 for ids in token_ids.values()), 0, 0)


def _check_places(
    model: nn.Module,
    found: AdapterTensors,
    places: dict[str, Place],
    token_ids: dict[str, list[int]],
    *,
    folder: Path,
    flag: str,
) -> None:
    """Check that `model` has a place for every tensor of an adapter.

    Raises:
        ValueError: it has not; names the first. Or one matrix is given two values.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    matrices = (model.get_input_embeddings(), model.get_output_embeddings())
    vocabulary = {id(module.weight) for module in matrices if hasattr(module, "weight")}
    unmatched = [name for name, parts in found.lora.items() if not _fits(places.get(name), parts)]
    given: dict[int, torch.Tensor] = {}
    for name, tensor in found.whole.items():
        parameter = parameters.get(name)
        if parameter is None or not _fits_whole(parameter, tensor, id(parameter) in vocabulary):
            unmatched.append(name.removesuffix(".weight"))
        elif not torch.equal(given.setdefault(id(parameter), tensor), tensor):
            raise ValueError(
                f"{flag} {str(folder)!r}: {name} is the embedding in {type(model).__name__}, and "
                "this adapter gives the two different values. Merge it into a model folder by "
                "PEFT first."
            )
    for name, tensor in found.rows.items():
        weight = getattr(modules.get(name), "weight", None)
        fits = id(weight) in vocabulary and len(tensor) == len(token_ids[name]) > 0
        if not fits or tensor.shape[1:] != _shape(weight)[1:]:
            unmatched.append(name)
    if unmatched:
        raise ValueError(
            f"{flag} {str(folder)!r}: {type(model).__name__} has no place for "
            f"{', '.join(sorted(unmatched)[:4])} of this adapter. Give the adapter of this base "
            "model, or merge it into a model folder by PEFT first."
        )


def _shape(weight: torch.Tensor) -> tuple[int, ...]:
    """Return a weight's whole shape, which ZeRO-3 keeps in ds_shape."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _fits_whole(parameter: torch.Tensor, tensor: torch.Tensor, is_vocabulary: bool) -> bool:
    """Return whether a tensor is a value of `parameter`; a vocabulary may have more rows."""
    shape = _shape(parameter)
    if is_vocabulary and tensor.dim() == 2:
        return tuple(tensor.shape[1:]) == shape[1:]
    return tuple(tensor.shape) == shape


def _scale(config: LoraConfig, name: str, *, dim: int) -> float:
    """Return the factor of B A in the layer `name`."""
    key = get_pattern_key(config.alpha_pattern.keys(), name)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha / (dim**0.5 if config.use_rslora else dim)


def _fits(place: Place | None, parts: dict[str, torch.Tensor]) -> bool:
    """Return whether `parts` are an adapter for the weight at `place`."""
    if set(parts) != {"lora_A", "lora_B"} or place is None:
        return False
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
