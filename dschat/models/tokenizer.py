"""Tokenizers: loading one from exactly the place the user named, and the ids that end or pad a text."""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from dschat.models.folder_checks import check_objects, read_object
from dschat.models.turn_end import split_turn_end
from dschat.runtime.paths import user_path

# Any one of these holds a vocabulary; tokenizer_config.json alone does not.
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
# Names under which published vocabularies carry a token that is for padding alone.
KNOWN_PAD_TOKENS = (PAD_TOKEN, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")


def model_source(path: str, *, flag: str) -> tuple[str, bool]:
    """Return the source of `path` for transformers, and whether it is a local folder.

    Raises:
        ValueError: `path` reads like a folder and is none, is a file, or holds damaged files.
    """
    local = user_path(path)
    if local.is_dir():
        check_objects(local, flag=flag)
        return str(local), True
    if local.exists():
        raise ValueError(f"{flag} {path!r} is a file; give the folder that holds it.")
    if (
        str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    ):  # a hub name is "name" or "owner/name"
        raise ValueError(
            f"{flag} {path!r} does not exist; give an existing model folder or a hub name."
        )
    return str(path), False


def adapter_base(source: str, *, flag: str) -> str | None:
    """The base model of a PEFT adapter folder, a folder or a hub id; None where `source` is no such folder.

    Raises:
        ValueError: the adapter does not say what its base is.
    """
    file = Path(source) / "adapter_config.json"
    if not file.is_file() or (Path(source) / "config.json").is_file():
        return None
    base = read_object(file, flag=flag).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{flag} {source!r} is an adapter, and its {file.name} has no base_model_name_or_path."
        )
    return base


def hub_error(path: str, *, flag: str, what: str, error: Exception) -> ValueError:
    """The ValueError for a hub name that gave no `what`; the first line of the cause is quoted."""
    cause = str(error).strip().split("\n")[0]
    return ValueError(
        f"{flag} {path!r}: no {what} found. It is no local folder, and as a hub name it could not be loaded "
        f"({type(error).__name__}: {cause}). Check the spelling and the network, or give a local model folder."
    )


def refuse_remote_code(path: str, *, flag: str, error: Exception) -> None:
    """Raise if `error` is transformers' refusal to run Python code that came with a model.

    Raises:
        ValueError: it is; names --trust_remote_code.
    """
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{flag} {path!r} comes with Python code of its own, which has not been run. Read it, and give "
            "--trust_remote_code if you trust it, or take a model of an architecture that transformers has."
        ) from error


def load_tokenizer(
    path: str,
    *,
    add_eot_token: bool = False,
    eot_token: str = "<|endoftext|>",
    trust_remote_code: bool = False,
    flag: str = "--model_name_or_path",
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    It always has an end-of-sequence and a padding token; padding falls back to the former. With `add_eot_token` the
    end-of-text token becomes *the* end-of-sequence token, so that the saved folder ends its texts with it in
    every later step and program, whether or not they are told of it.

    Args:
        flag: the command-line flag that `path` came from, for messages.

    Raises:
        ValueError: nothing there, no vocabulary there, or a vocabulary without an end-of-sequence token.
    """
    source, is_local = model_source(path, flag=flag)
    has_vocabulary = any((Path(source) / name).is_file() for name in VOCABULARY_FILES)
    if is_local and not has_vocabulary and (base := adapter_base(source, flag=flag)):
        source, is_local = model_source(base, flag=f"{flag} {path!r}: its base model")
        has_vocabulary = any((Path(source) / name).is_file() for name in VOCABULARY_FILES)
    if is_local and not trust_remote_code and not has_vocabulary:
        # transformers 5 makes an empty tokenizer out of config.json alone and says nothing.
        raise ValueError(
            f"{flag} {path!r} holds no tokenizer ({', '.join(VOCABULARY_FILES)}: none is there). "
            "Copy the tokenizer files of the base model into the folder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise any of many kinds
        refuse_remote_code(path, flag=flag, error=error)
        if is_local:
            what = (
                "the tokenizer cannot be read"
                if _reads_config(source)
                else "config.json cannot be used"
            )
            raise ValueError(f"{flag} {path!r}: {what}: {error}") from error
        raise hub_error(path, flag=flag, what="tokenizer", error=error) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"{flag} {path!r}: the tokenizer is empty; give a folder with its vocabulary files."
        )
    if add_eot_token:
        tokenizer.add_special_tokens({"eos_token": eot_token})
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{flag} {path!r}: the tokenizer has no end-of-sequence token, so no answer could end. "
            "Add --add_eot_token, or set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _reads_config(folder: str) -> bool:
    """Return whether the files that loading a tokenizer reads first are valid."""
    try:
        return not (Path(folder) / "config.json").is_file() or bool(
            AutoConfig.from_pretrained(folder)
        )
    except Exception:  # values that make no sense raise any of many kinds
        return False


def end_token_id(
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_eot_token: bool = False,
    eot_token: str = "<|endoftext|>",
) -> int:
    """The id of the token that ends every training answer.

    Raises:
        ValueError: --add_eot_token was given, and `eot_token` is not one token of this tokenizer.
    """
    if not add_eot_token:
        return tokenizer.eos_token_id
    token_id = tokenizer.get_vocab().get(eot_token)
    if token_id is None:
        raise ValueError(
            f"--eot_token {eot_token!r} is no token of this tokenizer; load it with --add_eot_token, or name one that "
            "it has."
        )
    return token_id


def as_ids(value: int | Iterable[int] | None) -> set[int]:
    """A configuration entry that is one id, several or none, as a set."""
    if value is None:
        return set()
    return {int(value)} if isinstance(value, int) else {int(v) for v in value}


def eos_token_ids(config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return all ids that end an answer, sorted.

    They are those of a model or generation config (one, a list or none), the tokenizer's own, and
    the one by which its chat template ends a turn.
    """
    ids = as_ids(getattr(config, "eos_token_id", None)) | as_ids(tokenizer.eos_token_id)
    return tuple(sorted(ids | as_ids(split_turn_end(tokenizer)[0])))


def ensure_unambiguous_pad(
    tokenizer: PreTrainedTokenizerBase, *, end_ids: Iterable[int] = ()
) -> int:
    """The id of a padding token that stands in no text; the tokenizer is changed where it had none.

    A saved reward model pools at the last token that is not padding, so a padding token that also ends texts
    (or begins or replaces something in them) would move the score. A token that the vocabulary keeps for padding
    is taken before a new one is added; len(tokenizer) then grows by one.

    Args:
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
