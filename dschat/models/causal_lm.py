"""Loading of causal language models.

Functions must not read parameter data unless they say so: under ZeRO-3 a parameter is an empty
shard.
"""

from pathlib import Path
from typing import Optional

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dschat.models.adapters import merge_adapter
from dschat.models.dropout import set_config_dropout
from dschat.models.folder_checks import check_finite, shard_names
from dschat.models.new_tokens import new_token_ids
from dschat.models.tokenizer import adapter_base, hub_error, model_source, refuse_remote_code
from dschat.models.vocabulary import check_vocabulary, embedding_rows, grow_vocabulary
from dschat.models.weights import refuse_damaged_weights, require_complete

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def check_model_folder(folder: str | Path, *, flag: str) -> None:
    """Check that `folder` holds config.json and complete weights.

    Raises:
        ValueError: something is missing; the message names each file.
    """
    folder = Path(folder)
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        indexes = [folder / f"{name}.index.json" for name in WEIGHT_FILES]
        index = next((path for path in indexes if path.is_file()), None)
        if index is not None:
            shards = shard_names(index, flag=flag)
            missing += [name for name in shards if not (folder / name).is_file()]
        else:
            names = ", ".join(f"{name} or {name}.index.json" for name in WEIGHT_FILES)
            missing.append(f"weights ({names})")
    if missing:
        raise ValueError(
            f"{flag} {str(folder)!r} is not a complete model folder; missing: "
            f"{', '.join(missing)}. "
            "Give the folder that the previous step wrote, or a hub name."
        )


def load_config(
    path: str, *, flag: str, trust_remote_code: bool = False, dropout: Optional[float] = None
) -> tuple[str, PreTrainedConfig]:
    """Return the source for from_pretrained and the configuration of `path`, with dropout set.

    The source of an adapter folder is that of its base model.

    Args:
        path: a model folder, an adapter folder or a hub name.
        flag: the command-line flag that `path` came from, for messages.
        trust_remote_code: allow Python code that comes with the model.
        dropout: set as every dropout probability; None keeps the model's own.

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
    except Exception as error:  # transformers raises many kinds for invalid values
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
    """Load a causal language model with all of its weights.

    A PEFT adapter folder is merged into its base.

    Args:
        path: a model folder, an adapter folder or a hub name.
        dtype: of the weights.
        tokenizer: the vocabulary grows if this has more tokens than the embedding has rows; it
            never shrinks.
        dropout: set as every dropout probability; None keeps the model's own.
        trust_remote_code: allow Python code that comes with the model.
        flag: the command-line flag that `path` came from, for messages.

    Raises:
        ValueError: nothing there, incomplete, a reward model, a tokenizer of another model, or
            weights that the architecture needs are missing.
    """
    source, config = load_config(
        path, flag=flag, trust_remote_code=trust_remote_code, dropout=dropout
    )
    architecture = next(iter(config.architectures or ()), "")
    if architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{flag} {path!r} is a reward model ({architecture}); give a causal language model."
        )
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.get_text_config().vocab_size, path=path, flag=flag)
    with refuse_damaged_weights(path, flag=flag):
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
        add_tokens(model, tokenizer)
    return model


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embedding to all tokens of `tokenizer`.

    The attribute `new_token_ids` of `model` then holds the ids without a trained row.
    """
    rows = getattr(model, "trained_rows", None) or embedding_rows(model)
    added = getattr(tokenizer, "added_ids", [])
    model.new_token_ids = new_token_ids(tokenizer, rows=rows, added=added)
    grow_vocabulary(model, len(tokenizer))


def merge_if_adapter(model: PreTrainedModel, path: str, *, flag: str) -> None:
    """Merge `path` into `model`, its base, if it is a PEFT adapter folder.

    The attribute `merged_adapter` of `model` then holds the folder, and `trained_rows` the number
    of tokens that it has trained rows for.
    """
    source, is_local = model_source(path, flag=flag)
    if is_local and adapter_base(source, flag=flag):
        model.trained_rows = merge_adapter(model, source, flag=flag)
        model.merged_adapter = source
