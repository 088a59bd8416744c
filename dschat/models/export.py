"""Save a model as a Hugging Face folder: weights, configurations, tokenizer, chat template."""

import copy
import fnmatch
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dschat.models.lora import plain_name
from dschat.models.new_tokens import CHILD
from dschat.models.structure import pretrained
from dschat.models.tokenizer import VOCABULARY_FILES, eos_token_ids
from dschat.models.weights import first_names
from dschat.runtime.files import apply_umask, fsync, umask

MAX_SHARD_SIZE = "5GB"
# Files of a saved model, removed when another takes its place. All other files of a folder
# (metrics, logs) stay.
MODEL_FILES = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "*.index.json",
    "config.json",
    "generation_config.json",
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
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
    """Save the model to `path`, as a folder that plain transformers loads with no weight missing.

    The folder is written next to `path` and renamed when it is complete and on disk. A crash leaves
    the old model (between two renames, under another name), never a partial one. Files of an
    existing folder that belong to no model (metrics, logs) move into the new one.

    Args:
        model: the transformers model, or a wrapper of one such as RewardModel. Its class,
            configuration and names are read, its parameters are not: they may be partitioned, or
            wrapped by LoRA.
        tensors: its whole tensors on the CPU, without LoRA (see merged_state_dict), under the names
            of `model`.state_dict() before LoRA. Tied tensors and buffers may be given or left out.
        tokenizer: saved into the folder with its chat template.
        path: the folder to write; an existing one is replaced.
        generation_config: what to save with a language model; by default `model`'s own, if valid.
        write_more: called with the folder before the rename, to write what else belongs to the
            model.

    Raises:
        ValueError: tensors are missing, left over, of another shape, or tied but different.
    """
    path = Path(path).resolve()  # a symbolic link stays; its target is replaced
    inner = pretrained(model)
    weights = _complete_tensors(inner, _without_wrapper(model, tensors))
    shell = _savable_copy(inner, tokenizer, generation_config)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~umask())  # mkdtemp's folders are private to their owner
        dtype = next(t.dtype for t in weights.values() if t.is_floating_point())
        shell.save_pretrained(temporary, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
        # save_pretrained writes the dtype of the module, which may differ from that of the tensors.
        shell.config.dtype = dtype
        shell.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if write_more is not None:
            write_more(temporary)
        apply_umask(temporary)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _without_wrapper(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `tensors` under the names of the transformers model inside `model`."""
    inner = pretrained(model)
    prefix = next(name for name, module in model.named_modules() if module is inner)
    if not prefix:
        return dict(tensors)
    outside = [name for name in tensors if not name.startswith(f"{prefix}.")]
    if outside:
        raise ValueError(
            f"tensors outside of {type(inner).__name__} cannot be saved with it: "
            f"{first_names(outside)}"
        )
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}


def _complete_tensors(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return one tensor for each name that `model` saves, changing `tensors`.

    Tied tensors appear once; buffers that are missing come from `model`.

    Raises:
        ValueError: tensors are missing, left over, of another shape, or tied but different.
    """
    own = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or name.endswith(f".{CHILD}.delta"):
            continue
        name = plain_name(name)
        if hasattr(value, "dense_shape"):
            # A quantised tensor has another name and shape than the weight that it stands for.
            name = f"{name.rpartition('.')[0]}.weight"
        own[name] = value
    for target, source in model.all_tied_weights_keys.items():
        if (
            target in tensors
            and source in tensors
            and not torch.equal(tensors[target], tensors[source])
        ):
            raise ValueError(
                f"{target} and {source} are one tensor in {type(model).__name__}, but differ here"
            )
        # named_parameters() may know the tensor by either name.
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
        raise ValueError(f"these tensors do not make a {type(model).__name__}: {found}")
    return tensors


def _shape(value: torch.Tensor) -> tuple[int, ...]:
    """Return a tensor's shape in a saved model.

    It is dense_shape if the tensor is quantised, and ds_shape if ZeRO-3 has partitioned it.
    """
    for attribute in ("dense_shape", "ds_shape"):
        if hasattr(value, attribute):
            return tuple(getattr(value, attribute))
    return tuple(value.shape)


def _savable_copy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: Optional[GenerationConfig],
) -> PreTrainedModel:
    """Return a shallow copy to save, since saving changes both configurations."""
    shell = copy.copy(model)
    shell.config = copy.deepcopy(model.config)
    if model.can_generate():
        shell.generation_config = savable_generation_config(model, tokenizer, generation_config)
    return shell


def savable_generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: Optional[GenerationConfig] = None,
) -> GenerationConfig:
    """Return a copy of `generation_config` that can be saved, with the tokenizer's ids.

    It stops at every end-of-sequence id of `model`'s configurations and of the tokenizer. If its
    sampling values contradict do_sample=False, as in some published models, only the ids are kept:
    transformers refuses to save such a configuration.

    Args:
        model: gives the default configuration and further end-of-sequence ids.
        tokenizer: gives the ids of the special tokens.
        generation_config: default: the model's own.
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
    # If true, loading would take the model configuration's single end id instead.
    config._from_model_config = False
    try:
        config.validate(strict=True)
    except ValueError:
        config = GenerationConfig(**ids)
    return config


def replace_folder(new: Path, path: Path) -> None:
    """Replace `path` by the complete folder `new`; both are in one parent folder."""
    for file in new.rglob("*"):
        fsync(file)
    fsync(new)
    if not path.exists():
        new.rename(path)
        fsync(path.parent)
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
    _move_other_files(old, path)
    fsync(path.parent)
    shutil.rmtree(aside)


def repair_folder(path: Path) -> None:
    """Complete or undo a ``replace_folder`` that was killed. Nobody else may write there meanwhile.

    Afterwards `path` is the complete new folder or the old one, and no temporary folder is left.
    """
    # As tempfile.mkdtemp names them.
    temporary = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    for aside in [entry for entry in path.parent.glob(".*") if temporary.fullmatch(entry.name)]:
        old = aside / path.name
        if aside.suffix == ".old" and old.is_dir():
            if path.exists():
                _move_other_files(old, path)
            else:
                old.rename(path)
        shutil.rmtree(aside)


def model_files(folder: Path) -> list[str]:
    """Return the sorted names of the files in `folder` that saving a model there replaces."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [
        name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)
    ]


def _move_other_files(old: Path, path: Path) -> None:
    """Move the files that belong to no model from `old` into `path`."""
    models = model_files(old)
    for entry in old.iterdir():
        if entry.name not in models and not (path / entry.name).exists():
            entry.rename(path / entry.name)
