"""Loading of tokenizers, only from the place the user named, and the ids that end or pad a text."""

import os
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from dschat.models.folder_checks import check_json_files, read_json_object
from dschat.models.turn_end import split_turn_end
from dschat.runtime.paths import user_path

# Each of these holds a vocabulary; tokenizer_config.json alone does not.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.tiktoken",
)
PAD_TOKEN = "<|pad|>"
# Names of tokens in published vocabularies that are for padding alone.
KNOWN_PAD_TOKENS = (PAD_TOKEN, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")


def model_source(path: str, *, flag: str) -> tuple[str, bool]:
    """Return the source of `path` for transformers, and whether it is a local folder.

    Raises:
        ValueError: `path` looks like a folder but does not exist, is a file, or holds damaged
            files.
    """
    local = user_path(path)
    if os.path.isdir(local):  # unlike Path.is_dir, it does not fail for a folder without access
        check_json_files(local, flag=flag)
        return str(local), True
    if os.path.exists(local):
        raise ValueError(f"{flag} {path!r} is a file; give the folder that holds it.")
    # A hub name is "name" or "owner/name".
    if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise ValueError(
            f"{flag} {path!r} does not exist; give an existing model folder or a hub name."
        )
    return str(path), False


def adapter_base(source: str, *, flag: str) -> str | None:
    """Return the base model of a PEFT adapter folder; None if `source` is no adapter folder.

    Raises:
        ValueError: the adapter does not say what its base is.
    """
    file = Path(source) / "adapter_config.json"
    if not file.is_file() or (Path(source) / "config.json").is_file():
        return None
    base = read_json_object(file, flag=flag).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{flag} {source!r} is an adapter, and its {file.name} has no base_model_name_or_path."
        )
    return base


def hub_error(path: str, *, flag: str, what: str, error: Exception) -> ValueError:
    """Return the ValueError for a hub name without `what`, with the cause's first line."""
    cause = str(error).strip().split("\n")[0]
    return ValueError(
        f"{flag} {path!r}: no {what} found. It is no local folder, and as a hub name it could not "
        f"be loaded ({type(error).__name__}: {cause}). Check the spelling and the network, or give "
        "a local model folder."
    )


def refuse_remote_code(path: str, *, flag: str, error: Exception) -> None:
    """Raise if `error` is transformers' refusal to run Python code that came with a model.

    Raises:
        ValueError: it is; names --trust_remote_code.
    """
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{flag} {path!r} comes with Python code, which has not been run. Read it and give "
            "--trust_remote_code if you trust it, or give a model of an architecture that "
            "transformers has."
        ) from error


def load_tokenizer(
    path: str,
    *,
    add_eot_token: bool = False,
    eot_token: str = "<|endoftext|>",
    trust_remote_code: bool = False,
    flag: str = "--model_name_or_path",
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name.

    It always has an end-of-sequence and a padding token; padding falls back to the former.

    Args:
        path: a model folder, an adapter folder or a hub name.
        add_eot_token: make `eot_token` the end-of-sequence token. The saved folder then ends its
            texts with it in every later step and program, with or without this flag. If the
            vocabulary does not have it yet, the tokenizer's attribute `added_ids` holds its id.
        eot_token: the end-of-text token.
        trust_remote_code: allow Python code that comes with the tokenizer.
        flag: the command-line flag that `path` came from, for messages.

    Raises:
        ValueError: nothing there, no vocabulary there, or a vocabulary without an end-of-sequence
            token.
    """
    source, is_local = model_source(path, flag=flag)
    has_vocabulary = any((Path(source) / name).is_file() for name in VOCABULARY_FILES)
    if is_local and not has_vocabulary and (base := adapter_base(source, flag=flag)):
        source, is_local = model_source(base, flag=f"{flag} {path!r}: its base model")
        has_vocabulary = any((Path(source) / name).is_file() for name in VOCABULARY_FILES)
    if is_local and not trust_remote_code and not has_vocabulary:
        # transformers 5 silently makes an empty tokenizer from config.json alone.
        raise ValueError(
            f"{flag} {path!r} holds no tokenizer (none of {', '.join(VOCABULARY_FILES)}). "
            "Copy the tokenizer files of the base model into the folder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise many kinds
        refuse_remote_code(path, flag=flag, error=error)
        if is_local:
            if _config_is_valid(source):
                fault = "the tokenizer cannot be read"
            else:
                fault = "config.json cannot be used"
            raise ValueError(f"{flag} {path!r}: {fault}: {error}") from error
        raise hub_error(path, flag=flag, what="tokenizer", error=error) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"{flag} {path!r}: the tokenizer is empty; give a folder with its vocabulary files."
        )
    tokenizer.added_ids = []  # of tokens that no saved model has seen
    if add_eot_token and tokenizer.add_special_tokens({"eos_token": eot_token}):
        tokenizer.added_ids = [tokenizer.eos_token_id]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{flag} {path!r}: the tokenizer has no end-of-sequence token, so no answer could end. "
            "Add --add_eot_token, or set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _config_is_valid(folder: str) -> bool:
    """Return whether config.json, which a tokenizer's loading reads first, is valid or absent."""
    if not (Path(folder) / "config.json").is_file():
        return True
    try:
        return bool(AutoConfig.from_pretrained(folder))
    except Exception:  # transformers raises many kinds for invalid values
        return False


def end_token_id(
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_eot_token: bool = False,
    eot_token: str = "<|endoftext|>",
) -> int:
    """Return the id of the token that ends every response in training.

    Raises:
        ValueError: --add_eot_token was given, and `eot_token` is not one token of this tokenizer.
    """
    if not add_eot_token:
        return tokenizer.eos_token_id
    token_id = tokenizer.get_vocab().get(eot_token)
    if token_id is None:
        raise ValueError(
            f"--eot_token {eot_token!r} is no token of this tokenizer; load it with "
            "--add_eot_token, or name one that it has."
        )
    return token_id


def as_ids(value: int | Iterable[int] | None) -> set[int]:
    """Return a configuration entry that is one id, several or none, as a set."""
    if value is None:
        return set()
    if isinstance(value, int):
        return {int(value)}
    return {int(v) for v in value}


def eos_token_ids(config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return all ids that end a response, sorted.

    They are those of a model or generation config (one, a list or none), the tokenizer's own, and
    the one by which its chat template ends a turn.
    """
    ids = as_ids(getattr(config, "eos_token_id", None)) | as_ids(tokenizer.eos_token_id)
    return tuple(sorted(ids | as_ids(split_turn_end(tokenizer)[0])))


def ensure_unambiguous_pad(
    tokenizer: PreTrainedTokenizerBase, *, end_ids: Iterable[int] = ()
) -> int:
    """Return the id of a padding token that occurs in no text, changing the tokenizer if needed.

    A saved reward model pools at the last token that is not padding. A padding token that also
    begins, ends or replaces something in a text would move the score. A token that the vocabulary
    reserves for padding is preferred to a new one, which makes len(tokenizer) grow by one.

    Args:
        tokenizer: changed in place if its padding token is missing or ambiguous.
        end_ids: further ids that may end a text, from the model's configuration.
    """
    taken = as_ids(tokenizer.eos_token_id) | as_ids(tokenizer.bos_token_id) | set(end_ids)
    taken |= as_ids(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return tokenizer.pad_token_id
    vocabulary = tokenizer.get_vocab()
    spare = [
        name for name in KNOWN_PAD_TOKENS if name in vocabulary and vocabulary[name] not in taken
    ]
    tokenizer.add_special_tokens({"pad_token": spare[0] if spare else PAD_TOKEN})
    return tokenizer.pad_token_id
