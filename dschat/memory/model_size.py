"""The sizes of a model that its memory depends on.

They are counted on the meta device, so nothing is loaded or allocated.
"""

import copy
import functools
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from dschat.config.options import FrozenFormat, LoraOptions, SystemOptions
from dschat.engine.quantized import Format, packed_columns
from dschat.generation.cache_size import CacheSize, count_cache
from dschat.generation.kernels.limits import next_power_of_two
from dschat.generation.tensor_parallel import split_plan
from dschat.models.causal_lm import load_config
from dschat.models.classifiers import ensure_classifier
from dschat.models.families import FAMILIES, SHAPES, shape_config
from dschat.models.lora import (
    ADAPTER,
    adapted_layer_names,
    adapted_weight,
    expert_adapters,
    lora_layers,
    lora_parameter_names,
    lora_targets,
    plain_name,
)
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import RewardModel
from dschat.models.structure import decoder_layers, embedding_modules, pretrained
from dschat.models.tokenizer import model_source


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model, in elements (not bytes)."""

    family: str  # transformers' model_type
    parameters: int
    groups: tuple[int, ...]  # trained elements, by optimizer group: matrices, vectors, adapters
    largest: int  # the largest parameter
    largest_trained: int
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int  # columns of the logits; 0 for a reward model
    trained_layers: int  # the layers that backward passes through
    trains_norms: bool = True
    lora_width: int = 0  # columns of all A x of one layer
    adapters: int = 0
    merged: int = 0  # weights that have adapters
    adapted_experts: int = 0  # of these, the weights of experts
    rounding: float = 1.0  # each parameter rounded up to a power of two, over the exact size
    dropout: float = 0.0
    quantized: int = 0  # weights that --quantize_frozen keeps in another format
    packed_bytes: int = 0  # of these weights, scales included
    largest_quantized: int = 0
    split: int = 0  # parameters that tensor-parallel generation divides
    positions: int | None = None  # learned positions; None if the model computes them
    cache: CacheSize = CacheSize()  # of one text; empty for a reward model

    @property
    def trained(self) -> int:
        """The number of trained elements."""
        return sum(self.groups)

    def weight_bytes(self, width: int) -> float:
        """Return the bytes of all weights, with `width` bytes for an element in training precision.

        Quantized weights have their own width.
        """
        return width * (self.parameters - self.quantized) + self.packed_bytes


def has_shape(name: str) -> bool:
    """Return whether a hub id, or its last part, names a published or tiny shape."""
    return name.rsplit("/", 1)[-1].lower().removesuffix("-hf") in SHAPES


def find_config(name: str, *, flag: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a folder, of a published or tiny shape, or of a hub id.

    Shapes are known by name; no hub is asked for them.

    Raises:
        ValueError: no model has this name. The message names `flag`.
    """
    if has_shape(name) and not model_source(name, flag=flag)[1]:
        return shape_config(name)
    return load_config(name, flag=flag, trust_remote_code=trust_remote_code)[1]


def named_size(
    name: str,
    *,
    flag: str,
    trust_remote_code: bool = False,
    reward: bool = False,
    lora: LoraOptions = LoraOptions(),
    system: SystemOptions | None = None,
    role: str = "",
    stored: FrozenFormat = "none",
) -> ModelSize:
    """Return the size of the model that ``find_config`` finds, as the step would prepare it.

    Each model is counted once.

    Args:
        name, flag, trust_remote_code: see ``find_config``.
        reward, lora, system, role, stored: see ``model_size``.

    Raises:
        ValueError: no model has this name, or options do not fit the model.
    """
    # The counts do not depend on these options, so they share a cache entry.
    if system is not None:
        system = replace(system, zero_stage=0, offload=False, gradient_checkpointing=False)
    lora = replace(lora, lora_alpha=1.0, lora_learning_rate=0.0)
    return _counted(name, flag, trust_remote_code, reward, lora, system, role, stored)


@functools.lru_cache
def _counted(name, flag, trust_remote_code, reward, lora, system, role, stored) -> ModelSize:
    config = find_config(name, flag=flag, trust_remote_code=trust_remote_code)
    options = dict(
        reward=reward,
        lora=lora,
        system=system,
        role=role,
        stored=stored,
        trust_remote_code=trust_remote_code,
    )
    # Making weights draws random numbers, but only for models that are not counted yet. A run's
    # weights must not depend on that.
    with torch.random.fork_rng(devices=[]):
        try:
            return model_size(config, **options)
        except (RuntimeError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{flag} {name!r}: no model can be made of its config.json: {error}"
            ) from error


def model_size(
    config: PreTrainedConfig,
    *,
    reward: bool = False,
    lora: LoraOptions = LoraOptions(),
    system: SystemOptions | None = None,
    role: str = "",
    stored: FrozenFormat = "none",
    trust_remote_code: bool = False,
) -> ModelSize:
    """Count a model.

    Args:
        config: of the model.
        reward: a reward model or critic, without logits.
        lora: its adapters; of a model that does not train, the layers that are quantized.
        system: options of its training; None if it does not train.
        role: "actor" or "critic" in step 3, for the flags' names in messages.
        stored: storage of those layers, if it does not train.
        trust_remote_code: run Python code from a model folder or hub repository.

    Raises:
        ValueError: more layers to freeze than the model has, or a LoRA scope that matches nothing.
    """
    text = config.get_text_config()
    fewer = _enough_layers(config, lora, system)
    model = _on_meta(
        config if fewer is None else _with_layers(config, fewer),
        reward=reward,
        trust_remote_code=trust_remote_code,
    )
    unbuilt = 0 if fewer is None else text.num_hidden_layers - fewer
    cache = CacheSize() if reward else count_cache(model, unbuilt=unbuilt)
    if system is None:
        model.requires_grad_(False)
    else:
        prepare_for_training(model, lora=lora, system=system, role=role)
    prefix, built = decoder_layers(model)
    # The layers that were not built are like the last one.
    repeated: dict[str, Any] = dict(last=f"{prefix}.{len(built) - 1}.", repeats=1 + unbuilt)
    counts = _parameter_counts(model, **repeated)
    kind = stored if system is None else system.frozen_format
    if kind != "none":
        inner = pretrained(model)
        names = adapted_layer_names(inner)
        if system is None:
            names = lora_targets(inner, lora.lora_module_name, lora.target_modules).layers
        layers = {id(inner.get_submodule(name)) for name in names}
        counts |= _quantized_counts(model, layers, kind, **repeated)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return ModelSize(
        family=config.model_type,
        largest=max(p.numel() for p in model.parameters()),
        largest_trained=max((p.numel() for _, p in trained), default=0),
        layers=len(built) + unbuilt,
        hidden=text.hidden_size,
        heads=getattr(text, "num_attention_heads", 0),  # recurrent models may have none
        intermediate=max(_intermediate(layer, text) for layer in built),
        vocab=0 if reward else text.vocab_size,
        trained_layers=unbuilt + _trained_layers(model, prefix, len(built)) if trained else 0,
        trains_norms=any(p.dim() == 1 for _, p in trained),
        lora_width=_lora_width(built[-1]),
        dropout=_dropout(text, system),
        split=_split_count(model, **repeated),
        positions=_learned_positions(model, text),
        cache=cache,
        **counts,
    )


def _parameter_counts(model: nn.Module, *, last: str, repeats: int) -> dict:
    """Return fields of ModelSize that are sums over parameters.

    Args:
        model: on the meta device.
        last: prefix of the last layer's parameters.
        repeats: number of times that the last layer counts.
    """
    adapters = lora_parameter_names(model)
    adapted = {id(adapted_weight(layer)) for layer in lora_layers(model).values()}
    experts = {id(adapted_weight(layer)) for layer in expert_adapters(model)}
    groups: dict[tuple, int] = {}
    rounded = 0
    names = ("parameters", "adapters", "merged", "adapted_experts")
    counts = dict.fromkeys(names, 0)
    for name, p in model.named_parameters():
        times = repeats if name.startswith(last) else 1
        numel = p.numel() * times
        rounded += next_power_of_two(p.numel()) * times
        counts["parameters"] += numel
        counts["adapters"] += numel * (name in adapters)
        counts["merged"] += numel * (id(p) in adapted)
        counts["adapted_experts"] += numel * (id(p) in experts)
        if p.requires_grad:
            key = (name in adapters, p.dim() > 1)
            groups[key] = groups.get(key, 0) + numel
    return {"groups": tuple(groups.values()), "rounding": rounded / counts["parameters"], **counts}


def _lora_width(layer: nn.Module) -> int:
    """Return the columns of all A x of a decoder layer; experts' adapters are added to weights."""
    layers = (layer.get_submodule(name.rpartition(".")[0]) for name in adapted_layer_names(layer))
    return sum(adapted.r[ADAPTER] for adapted in layers)


def _enough_layers(
    config: PreTrainedConfig, lora: LoraOptions, system: SystemOptions | None
) -> int | None:
    """Return the number of decoder layers to build for counting; None for all of them.

    A few are enough if all are alike, which saves seconds.
    """
    if config.model_type not in (*FAMILIES, "bloom"):
        return None
    layers = config.get_text_config().num_hidden_layers
    frozen = 0 if system is None else system.freeze_layers
    chosen = " ".join([lora.lora_module_name or "", *lora.target_modules])
    # A number, or a regular expression, may tell layers apart.
    may_differ = re.search(r"[^\w.\- ]|\d", chosen) is not None
    are_enough = 0 <= frozen < layers - 2 and not may_differ
    return frozen + 2 if are_enough and _are_alike(config) else None


def _are_alike(config: PreTrainedConfig) -> bool:
    """Return whether all layers of a configuration have the same kind of attention."""
    return len(set(getattr(config, "layer_types", None) or ())) <= 1


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    found = copy.deepcopy(config)
    found.num_hidden_layers = layers
    if getattr(found, "layer_types", None):
        found.layer_types = found.layer_types[:layers]
    return found


def _on_meta(config: PreTrainedConfig, *, reward: bool, trust_remote_code: bool) -> nn.Module:
    with torch.device("meta"):
        if not reward:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        config.num_labels = 1
        ensure_classifier(config)
        return RewardModel(
            AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
        )


def _quantized_counts(
    model: nn.Module, layers: set[int], kind: Format, *, last: str, repeats: int
) -> dict[str, int]:
    """Count the weights that are kept quantized, of modules with these ids.

    See ``_parameter_counts``.
    """
    found = dict(quantized=0, packed_bytes=0, largest_quantized=0)
    for name, linear in model.named_modules():
        if id(linear) not in layers:
            continue
        numel = linear.weight.numel()
        times = repeats if name.startswith(last) else 1
        found["quantized"] += times * numel
        inputs = linear.nx if isinstance(linear, Conv1D) else linear.in_features
        found["packed_bytes"] += times * numel // inputs * packed_columns(inputs, kind)
        found["largest_quantized"] = max(found["largest_quantized"], numel)
    return found


def _split_count(model: nn.Module, *, last: str, repeats: int) -> int:
    """Count the parameters that tensor-parallel generation cuts; see ``_parameter_counts``."""
    plan = split_plan(pretrained(model).config)
    found = 0
    for name, p in model.named_parameters():
        path, _, leaf = plain_name(name).rpartition(".")
        style = next((style for linear, style in plan.items() if path.endswith(f".{linear}")), None)
        is_cut = style == "colwise" or (style == "rowwise" and leaf == "weight")
        found += is_cut * p.numel() * (repeats if name.startswith(last) else 1)
    return found


def _learned_positions(model: nn.Module, text: PreTrainedConfig) -> int | None:
    """Return the number of learned positions; None if the model computes them."""
    most = getattr(text, "max_position_embeddings", None)
    tokens = pretrained(model).get_input_embeddings()
    others = [
        m for m in embedding_modules(model) if isinstance(m, nn.Embedding) and m is not tokens
    ]
    # OPT's table has two more rows. Other tables, such as Gemma's per-layer tokens, have many more.
    return most if most and any(most <= m.num_embeddings <= most + 8 for m in others) else None


def _intermediate(layer: nn.Module, text: PreTrainedConfig) -> int:
    """Return the columns of the feed-forward part of one token.

    That is the longest side of all matrices outside the attention. Experts are stacked in tensors
    of three dimensions, of which a token passes through a few.
    """
    outside = [p for name, p in layer.named_parameters() if "att" not in name]
    dense = max((max(p.shape) for p in outside if p.dim() == 2), default=0)
    expert = max((max(p.shape[1:]) for p in outside if p.dim() == 3), default=0)
    active = getattr(text, "num_experts_per_tok", None) or 1
    return max(dense, active * expert, text.hidden_size)


def _trained_layers(model: nn.Module, prefix: str, layers: int) -> int:
    """Return the number of layers that backward passes through.

    It passes through all layers if the embeddings train, else down to the lowest layer with a
    trained parameter.
    """
    if any(p.requires_grad for module in embedding_modules(model) for p in module.parameters()):
        return layers
    trained = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith(f"{prefix}.")
    ]
    return layers - min(
        (int(name[len(prefix) + 1 :].split(".")[0]) for name in trained), default=layers
    )


def _dropout(config: PreTrainedConfig, system: SystemOptions | None) -> float:
    """Return the largest dropout probability of the hidden states in training."""
    if system is None or system.dropout is not None:
        return 0.0 if system is None else system.dropout
    names = ("dropout", "resid_pdrop", "hidden_dropout")
    return max(float(getattr(config, name, 0.0) or 0.0) for name in names)
