"""Writing a model as a Hugging Face folder: safetensors, configurations, tokenizer and chat template."""

import copy
import fnmatch
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dschat.models.structure import pretrained
from dschat.models.tokenizer import VOCABULARY_FILES, eos_token_ids
from dschat.models.weights import first_names

MAX_SHARD_SIZE = "5GB"
# What belongs to a saved model, and goes when another takes its place; the rest of a folder (metrics, logs) stays.
MODEL_FILES = (
    *(
        "model*.safetensors",
        "pytorch_model*.bin",
        "*.index.json",
        "config.json",
        "generation_config.json",
    ),
    *VOCABULARY_FILES,
    *(
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    "adapter",
)


def save_pretrained_folder(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    generation_config: Optional[GenerationConfig] = None,
    write_more: Optional[Callable[[Path], None]] = None,
) -> None:
    """Write the model to `path`, as a folder that plain transformers loads with no weight missing.

    It is written beside `path` and takes its name when it is complete and on disk: a crash leaves the old model, or
    in the moment between two renames the old one under another name, but never half of one. Files of an existing
    folder that belong to no model (metrics, logs) move into the new one.

    Args:
        model: the transformers model, or a wrapper of one such as RewardModel. Its class, configuration and names are
            read, its parameters are not: they may be partitioned, or wrapped by LoRA.
        tensors: its whole tensors on the CPU, without LoRA (see merged_state_dict), under the names of
            `model`.state_dict() before LoRA. Tied tensors may be given or left out; buffers too.
        generation_config: what to save beside a language model; by default `model`'s own, where it is valid.
        write_more: called with the folder before it takes its name, to write what else belongs to the model.

    Raises:
        ValueError: tensors are missing, left over, of another shape, or tied but different.
    """
    path = Path(path).resolve()  # a link stays a link, and what it points to is replaced
    inner = pretrained(model)
    weights = _complete_tensors(inner, _without_wrapper(model, tensors))
    shell = _savable_copy(inner, tokenizer, generation_config)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
        dtype = next(t.dtype for t in weights.values() if t.is_floating_point())
        shell.save_pretrained(temporary, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
        # save_pretrained writes the dtype of the module that trains, which need not be that of the tensors.
        shell.config.dtype = dtype
        shell.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if write_more is not None:
            write_more(temporary)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _without_wrapper(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` under the names of the transformers model inside `model`."""
    inner = pretrained(model)
    prefix = next(name for name, module in model.named_modules() if module is inner)
    if not prefix:
        return dict(tensors)
    strangers = [name for name in tensors if not name.startswith(f"{prefix}.")]
    if strangers:
        raise ValueError(
            f"tensors outside of {type(inner).__name__} cannot be saved with it: {first_names(strangers)}"
        )
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}


def _complete_tensors(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """One tensor for each name that `model` saves: tied ones once, buffers from `model` where they were left out."""
    own = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        # What is quantised has another name than the weight that it stands for, and another shape.
        own[f"{name.rpartition('.')[0]}.weight" if hasattr(value, "dense_shape") else name] = value
    for target, source in model.all_tied_weights_keys.items():
        if (
            target in tensors
            and source in tensors
            and not torch.equal(tensors[target], tensors[source])
        ):
            raise ValueError(
                f"{target} and {source} are one tensor in {type(model).__name__}, but differ here"
            )
        # Either of the two may be the one that named_parameters() knows.
        tensors.setdefault(source, tensors.get(target))
        tensors.pop(target, None)
        own.pop(target, None)
    for name, value in own.items():
        if tensors.get(name) is None and not isinstance(value, nn.Parameter):
            tensors[name] = value.detach().cpu()
    given = {name for name in own if tensors.get(name) is not None}
    shapes = {name: _shape(own[name]) for name in given}
    faults = {
        "missing": set(own) - given,
        "not part of the model": set(tensors) - set(own),
        "of another shape": {name for name in given if tuple(tensors[name].shape) != shapes[name]},
    }
    found = "; ".join(f"{what}: {first_names(names)}" for what, names in faults.items() if names)
    if found:
        raise ValueError(f"these tensors are no {type(model).__name__}: {found}")
    return tensors


def _shape(value: torch.Tensor) -> tuple[int, ...]:
    """The shape that a tensor has in a saved model, whether it is quantised (dense_shape) or partitioned (ds_shape)."""
    return tuple(
        next(getattr(value, n) for n in ("dense_shape", "ds_shape", "shape") if hasattr(value, n))
    )


def _savable_copy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: Optional[GenerationConfig],
) -> PreTrainedModel:
    """A shallow copy that can be saved: saving writes into both configurations, and the model in use keeps its own."""
    shell = copy.copy(model)
    shell.config = copy.deepcopy(model.config)
    if model.can_generate():
        shell.generation_config = sane_generation_config(model, tokenizer, generation_config)
    return shell


def sane_generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: Optional[GenerationConfig] = None,
) -> GenerationConfig:
    """`generation_config` (default: the model's own) with the ids of the tokenizer, in a state that can be saved.

    It stops at every end-of-sequence id of either configuration and of the tokenizer. Where its sampling numbers
    contradict do_sample=False, as some published ones do, only the ids are kept: transformers refuses to save it.
    """
    base = generation_config if generation_config is not None else model.generation_config
    end_ids = sorted({*eos_token_ids(base, tokenizer), *eos_token_ids(model.config, tokenizer)})
    ids = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids[0] if len(end_ids) == 1 else end_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = copy.deepcopy(base)
    for name, value in ids.items():
        setattr(config, name, value)
    config._from_model_config = (
        False  # or loading would take the model configuration's single end id instead
    )
    try:
        config.validate(strict=True)
    except ValueError:
        config = GenerationConfig(**ids)
    return config


def replace_folder(new: Path, path: Path) -> None:
    """Put the complete folder `new` in the place of `path`; both lie in one parent folder."""
    for file in new.rglob("*"):
        _fsync(file)
    _fsync(new)
    if not path.exists():
        new.rename(path)
        _fsync(path.parent)
        return
    # A rename cannot replace a folder that holds files.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = path.rename(aside / path.name)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        aside.rmdir()
        raise
    _move_the_rest(old, path)
    _fsync(path.parent)
    shutil.rmtree(aside)


def repair_folder(path: Path) -> None:
    """Finish or undo what ``replace_folder`` did not come to when its process was killed; nobody may write there now.

    Afterwards `path` is the new folder with all that belongs there, or the old one, and nothing is left beside it.
    """
    ours = re.compile(
        rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(tmp|old)"
    )  # as tempfile.mkdtemp names them
    for aside in [entry for entry in path.parent.glob(".*") if ours.fullmatch(entry.name)]:
        old = aside / path.name
        if aside.suffix == ".old" and old.is_dir():
            if path.exists():
                _move_the_rest(old, path)
            else:
                old.rename(path)
        shutil.rmtree(aside)


def files_of_a_model(folder: Path) -> list[str]:
    """Return the files that saving a model to `folder` replaces."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [
        name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)
    ]


def _move_the_rest(old: Path, path: Path) -> None:
    """Move what belongs to no model from `old` into `path`."""
    models = files_of_a_model(old)
    for entry in old.iterdir():
        if entry.name not in models and not (path / entry.name).exists():
            entry.rename(path / entry.name)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
