"""The numbers of a model that its memory depends on, counted on the meta device: nothing is loaded
or allocated.
"""

import copy
import functools
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from dschat.config.options import LoraOptions, SystemOptions
from dschat.engine.quantized import group_size
from dschat.generation.kernels.limits import next_power_of_two
from dschat.generation.tensor_parallel import split_plan
from dschat.models.causal_lm import load_config
from dschat.models.families import FAMILIES, SHAPES, shape_config
from dschat.models.lora import lora_parameter_names
from dschat.models.prepare import prepare_for_training
from dschat.models.reward_model import RewardModel
from dschat.models.structure import decoder_layers, embedding_modules, pretrained
from dschat.models.tokenizer import model_source


@dataclass(frozen=True)
class ModelSize:
    """Elements, not bytes."""

    family: str  # transformers' model_type
    parameters: int
    groups: tuple[int, ...]  # trained elements, by optimizer group: matrices, vectors, adapters
    largest: int  # the largest parameter
    largest_trained: int
    layers: int
    hidden: int
    heads: int
    kv_width: int  # of the keys of one layer: kv_heads x width of a head
    intermediate: int
    vocab: int  # columns of the logits; 0 for a reward model
    trained_layers: int  # the layers that backward passes through
    trains_norms: bool = True
    lora_width: int = 0  # columns of all A x of one layer
    adapters: int = 0
    merged: int = 0  # weights that adapters stand beside
    rounding: float = 1.0  # what parameters take in powers of two, one by one, over what they have
    dropout: float = 0.0
    int8: int = 0  # weights that MixZ++ keeps in int8
    scales: int = 0  # and their fp32 scales
    largest_int8: int = 0
    split: int = 0  # what tensor-parallel generation divides
    positions: int | None = None  # the most that a text may have, where they are learned

    @property
    def trained(self) -> int:
        """Trained elements."""
        return sum(self.groups)

    def weight_bytes(self, width: int) -> float:
        """Return the bytes of all weights in the precisions that they are kept in; `width` is that
        of training.
        """
        return width * (self.parameters - self.int8) + self.int8 + 4 * self.scales


def has_shape(name: str) -> bool:
    """Return whether a hub id, or its last part, names a published or tiny shape."""
    return name.rsplit("/", 1)[-1].lower().removesuffix("-hf") in SHAPES


def find_config(name: str, *, flag: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a folder, of a published or tiny shape by its name (without any
    hub), or of a hub id.

    Raises:
        ValueError: nothing of that name; names `flag`.
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
) -> ModelSize:
    """Return the size of what `find_config` finds, as the step would prepare it; counted once.

    Args:
        reward, system, role: see ``model_size``.

    Raises:
        ValueError: nothing of that name, or options that do not fit the model.
    """
    if system is not None:  # what the counts do not depend on
        system = replace(system, zero_stage=0, offload=False, gradient_checkpointing=False)
    lora = replace(lora, lora_alpha=1.0, lora_learning_rate=0.0)
    return _counted(name, flag, trust_remote_code, reward, lora, system, role)


@functools.lru_cache
def _counted(name, flag, trust_remote_code, reward, lora, system, role) -> ModelSize:
    config = find_config(name, flag=flag, trust_remote_code=trust_remote_code)
    options = dict(
        reward=reward, lora=lora, system=system, role=role, trust_remote_code=trust_remote_code
    )
    # Making weights draws random numbers, and what has been counted before is not counted again: a
    # run's own weights must
    # not depend on that.
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
    trust_remote_code: bool = False,
) -> ModelSize:
    """Count a model.

    Args:
        reward: a reward model or critic, without logits.
        system: how it is trained; None: it is not.
        role: "actor" or "critic" in step 3, for the flags' names in messages.

    Raises:
        ValueError: more layers to freeze than there are, or a LoRA scope that matches nothing.
    """
    text = config.get_text_config()
    layers, shallow = text.num_hidden_layers, _enough_layers(config, lora, system)
    model = _on_meta(
        _with_layers(config, shallow), reward=reward, trust_remote_code=trust_remote_code
    )
    if system is None:
        model.requires_grad_(False)
    else:
        prepare_for_training(model, lora=lora, system=system, role=role)
    prefix, built = decoder_layers(model)
    # The layers that were not built are as the last one.
    repeated = dict(last=f"{prefix}.{len(built) - 1}.", repeats=1 + layers - shallow)
    counts = _parameter_counts(model, **repeated)
    if system is not None and system.enable_mixed_precision_lora:
        counts |= _int8_counts(model, **repeated)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        family=config.model_type,
        largest=max(p.numel() for p in model.parameters()),
        largest_trained=max((p.numel() for _, p in trained), default=0),
        layers=layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        intermediate=_intermediate(built[0]),
        vocab=0 if reward else text.vocab_size,
        trained_layers=layers - shallow + _trained_layers(model, prefix, shallow) if trained else 0,
        trains_norms=any(p.dim() == 1 for _, p in trained),
        lora_width=sum(p.shape[0] for name, p in built[-1].named_parameters() if "lora_A" in name),
        dropout=_dropout(text, system),
        split=_split_count(model, **repeated),
        positions=_learned_positions(model, text),
        **counts,
    )


def _parameter_counts(model: nn.Module, *, last: str, repeats: int) -> dict:
    """Sum the fields of ModelSize over parameters; those below `last` count `repeats` times."""
    adapters = lora_parameter_names(model)
    groups: dict[tuple, int] = {}
    rounded = 0
    counts = dict.fromkeys(("parameters", "adapters", "merged"), 0)
    for name, p in model.named_parameters():
        times = repeats if name.startswith(last) else 1
        numel = p.numel() * times
        rounded += next_power_of_two(p.numel()) * times
        counts["parameters"] += numel
        counts["adapters"] += numel * (name in adapters)
        counts["merged"] += numel * name.endswith("base_layer.weight")
        if p.requires_grad:
            key = (name in adapters, p.dim() > 1)
            groups[key] = groups.get(key, 0) + numel
    return {"groups": tuple(groups.values()), "rounding": rounded / counts["parameters"], **counts}


def _enough_layers(
    config: PreTrainedConfig, lora: LoraOptions, system: SystemOptions | None
) -> int:
    """Decoder layers to build for counting: a few where all are alike, which spares seconds; else
    all.
    """
    layers = config.get_text_config().num_hidden_layers
    frozen = 0 if system is None else system.freeze_layers
    one_layer_named = any(letter.isdigit() for letter in lora.lora_module_name or "")
    alike = config.model_type in (*FAMILIES, "bloom") and not one_layer_named
    return frozen + 2 if alike and 0 <= frozen < layers - 2 else layers


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
        return RewardModel(
            AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code
            )
        )


def _int8_counts(model: nn.Module, *, last: str, repeats: int) -> dict[str, int]:
    """Count the weights that adapters stand beside, as MixZ++ keeps them; those below `last` count
    `repeats` times.
    """
    found = dict(int8=0, scales=0, largest_int8=0)
    for name, linear in model.named_modules():
        if not name.endswith(".base_layer"):
            continue
        numel = linear.weight.numel()
        times = repeats if name.startswith(last) else 1
        found["int8"] += times * numel
        found["scales"] += (
            times
            * numel
            // group_size(linear.nx if isinstance(linear, Conv1D) else linear.in_features)
        )
        found["largest_int8"] = max(found["largest_int8"], numel)
    return found


def _split_count(model: nn.Module, *, last: str, repeats: int) -> int:
    """Count the parameters that tensor-parallel generation cuts; those below `last` count `repeats`
    times.
    """
    plan, found = split_plan(pretrained(model).config), 0
    for name, p in model.named_parameters():
        path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
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
    # OPT's table has two rows more. Other tables, such as Gemma's of the tokens for each layer,
    # have many more.
    return most if most and any(most <= m.num_embeddings <= most + 8 for m in others) else None


def _intermediate(layer: nn.Module) -> int:
    """Return the columns of the feed-forward part: the longest side of a matrix that is not of the
    attention.
    """
    matrices = [p for name, p in layer.named_parameters() if p.dim() == 2 and "att" not in name]
    return max(max(p.shape) for p in matrices)


def _trained_layers(model: nn.Module, prefix: str, layers: int) -> int:
    """Return the layers that backward passes through: from the lowest up that holds something
    trained; all, where the
    embeddings train.
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
