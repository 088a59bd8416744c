"""Causal language models: loading, and the switches that training needs.

Nothing here may read parameter data unless it says so: under ZeRO-3 a parameter is an empty shard.
"""

import contextlib
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dschat.models.folders import check_finite, shards_of
from dschat.models.structure import decoder_layers, embedding_modules, forward_takes, pretrained
from dschat.models.tokenizer import adapter_base, hub_error, model_source, refuse_remote_code
from dschat.models.vocabulary import check_vocabulary, grow_vocabulary

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def check_model_folder(folder: str | Path, *, flag: str) -> None:
    """Nothing where `folder` holds config.json and complete weights.

    Raises:
        ValueError: something is missing; the message names each file.
    """
    folder = Path(folder)
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    indexes = [folder / f"{name}.index.json" for name in WEIGHT_FILES]
    index = next((path for path in indexes if path.is_file()), None)
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        pass
    elif index is not None:
        missing += [name for name in shards_of(index, flag=flag) if not (folder / name).is_file()]
    else:
        missing.append("weights (" + ", ".join(f"{name} or {name}.index.json" for name in WEIGHT_FILES) + ")")
    if missing:
        raise ValueError(
            f"{flag} {str(folder)!r} is no complete model folder; missing: {', '.join(missing)}. "
            "Give the folder that the previous step wrote, or a hub name."
        )


def load_config(
    path: str, *, flag: str, trust_remote_code: bool = False, dropout: Optional[float] = None
) -> tuple[str, PreTrainedConfig]:
    """What to hand to from_pretrained for `path` (of an adapter: for its base), and its configuration with every dropout
    probability set.

    Raises:
        ValueError: nothing there, or the folder is incomplete.
    """
    source, is_local = model_source(path, flag=flag)
    if is_local and (base := adapter_base(source, flag=flag)):
        flag = f"{flag} {path!r}: its base model"
        source, is_local = model_source(base, flag=flag)
    if is_local:
        check_model_folder(source, flag=flag)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # values that make no sense raise any of many kinds
        refuse_remote_code(path, flag=flag, error=error)
        if is_local:
            raise ValueError(f"{flag} {path!r}: config.json cannot be used: {error}") from error
        raise hub_error(source, flag=flag, what="config.json", error=error) from error
    if dropout is not None:
        set_config_dropout(config, dropout)
    return source, config


def load_causal_lm(
    path: str,
    *,
    dtype: torch.dtype,
    tokenizer: Optional[PreTrainedTokenizerBase] = None,
    dropout: Optional[float] = None,
    trust_remote_code: bool = False,
    flag: str = "--model_name_or_path",
) -> PreTrainedModel:
    """A causal language model with all of its weights, in `dtype`. A PEFT adapter folder is merged into its base.

    Args:
        tokenizer: the vocabulary grows where this has more tokens than the embedding has rows; it never shrinks.
        dropout: set as every dropout probability; None keeps the model's own.
        flag: the command-line flag that `path` came from, for messages.

    Raises:
        ValueError: nothing there, incomplete, a reward model, a tokenizer of another model, or weights that the
            architecture needs are absent.
    """
    source, config = load_config(path, flag=flag, trust_remote_code=trust_remote_code, dropout=dropout)
    architecture = next(iter(config.architectures or ()), "")
    if architecture.endswith("ForSequenceClassification"):
        raise ValueError(f"{flag} {path!r} is a reward model ({architecture}); give a causal language model.")
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.get_text_config().vocab_size, path=path, flag=flag)
    with readable_weights(path, flag=flag):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    require_complete(model, info, path=path, flag=flag)
    merge_if_adapter(model, path, flag=flag)
    check_finite(model, path=path, flag=flag)
    if tokenizer is not None:
        grow_vocabulary(model, len(tokenizer))
    return model


@contextlib.contextmanager
def readable_weights(path: str, *, flag: str):
    """Inside, files of weights are read.

    Raises:
        ValueError: one is damaged, or holds more than tensors, which might run code as it is read.
    """
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamReader|zip archive", str(error)):
            raise
        reason = f"{type(error).__name__}: " + str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{flag} {path!r}: its weights cannot be read ({reason}). A file is damaged, or a .bin holds more than tensors, "
            "which is refused. Give a whole copy, with safetensors where there are any."
        ) from error


def merge_if_adapter(model: PreTrainedModel, path: str, *, flag: str) -> None:
    """Merge `path` into `model`, its base, where it is a PEFT adapter folder; ``merged_adapter`` then names it."""
    source, is_local = model_source(path, flag=flag)
    if is_local and adapter_base(source, flag=flag):
        from dschat.models.adapters import merge_adapter  # which imports this module
        merge_adapter(model, source, flag=flag)
        model.merged_adapter = source


def require_complete(
    model: PreTrainedModel,
    info: dict,
    *,
    path: str,
    flag: str,
    fresh: Iterable[str] = (),
    left_over: Iterable[str] = (),
) -> None:
    """Nothing where every weight of `model` but those in `fresh` came from the checkpoint.

    transformers itself initialises what is missing or of another shape at random, warns and goes on.

    Args:
        info: the loading info of from_pretrained.
        left_over: names in the checkpoint that the model has no place for, where that is an error.

    Raises:
        ValueError: with the names, all of them at once.
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
            f"{flag} {path!r} holds other weights than {type(model).__name__} needs ({found}). "
            "Check that config.json and the weights belong together and are of the right kind of model."
        )


def first_names(names: Iterable[str], count: int = 8) -> str:
    """The first `count` of `names`, sorted, as one line, with the number of the rest."""
    names = sorted(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def _is_probability(name: str, value) -> bool:
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)


def set_config_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every numeric entry of `config` with "drop" in its name to `probability`, and layerdrop to 0.

    A layer that one process leaves out and another does not has no gradient to share: their collectives part ways.
    """
    for name in [n for n, v in vars(config).items() if _is_probability(n, v)]:
        setattr(config, name, 0.0 if "layerdrop" in name else float(probability))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in `model` to 0: nn.Dropout modules (LoRA's too), numbers that modules keep for
    functional dropout, and the configuration. train() stays usable, which gradient checkpointing needs.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in [n for n, v in vars(module).items() if _is_probability(n, v)]:
            setattr(module, name, 0.0)
    set_config_dropout(pretrained(model).config, 0.0)


def freeze_lower_layers(model: nn.Module, num_layers: int, *, flag: str = "--freeze_layers") -> None:
    """Freeze the token and position embeddings and the lowest `num_layers` decoder layers; 0 freezes nothing.

    Where the head is tied to the embedding it is the same matrix, and is frozen with it. Call it after add_lora,
    so that adapters in the frozen layers are frozen as well.

    Args:
        flag: the command-line flag that `num_layers` came from, for messages.

    Raises:
        ValueError: the model has fewer layers, or the number is negative.
    """
    _, layers = decoder_layers(model)
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"{flag} {num_layers} does not fit a model of {len(layers)} layers; give 0 to {len(layers)}."
        )
    if num_layers == 0:
        return
    for module in [*embedding_modules(model), *layers[:num_layers]]:
        module.requires_grad_(False)


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] int64 that count attended tokens only; padding gets 0 on the left, the last one on the right.

    Args:
        attention_mask: [B, T], 1 (or True) where a token counts.
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def takes_position_ids(model: nn.Module) -> bool:
    """True where positions can be given. ALiBi families (BLOOM) take none: they derive them from the mask."""
    return forward_takes(pretrained(model).base_model, "position_ids")


def forward_logits(
    engine: nn.Module,
    model: nn.Module,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int = 0,
) -> torch.Tensor:
    """The logits [B, K, V] of the last K = `logits_to_keep` positions, or of all T where that is 0.

    Args:
        engine: what is called: a DeepSpeed engine around `model`, so that its hooks run, or `model` itself.
        model: the transformers model, asked what its forward takes.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 where a token counts; positions follow from it, so padding may be on either side.
    """
    inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if takes_position_ids(model):
        inputs["position_ids"] = position_ids_from_mask(attention_mask)
    if logits_to_keep and forward_takes(pretrained(model), "logits_to_keep"):
        inputs["logits_to_keep"] = logits_to_keep
    logits = engine(**inputs).logits
    return logits[:, -logits_to_keep:] if logits_to_keep else logits


def enable_checkpointing(model: nn.Module, *, use_reentrant: bool = False) -> None:
    """Recompute activations in backward. Training forwards then pass use_cache=False; generation keeps its cache,
    since checkpointing only acts in train mode.
    """
    inner = pretrained(model)
    # The older of the two names is deprecated by transformers 5.23, and the only one that 5.17 has.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    if not use_reentrant:
        # transformers makes the embedding's output need a gradient. Reentrant checkpoints need that where the embedding
        # is frozen; the others do not, and would pay for a backward pass through frozen layers.
        inner.disable_input_require_grads()
