"""Miniature models with random weights and a byte-level tokenizer, made without downloads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from dschat.models.families import FAMILIES, TINY_VOCAB, tiny_shape
from dschat.runtime.files import apply_umask

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MAX_POSITIONS = 512


def byte_tokenizer(*, pad_is_eos: bool = False, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 259 tokens; decoding restores any text.

    Token 0 is the padding token, 1 is <s>, 2 is </s>, and the bytes follow. With `pad_is_eos`,
    </s> pads and token 0 is the unknown token.
    """
    first = "<unk>" if pad_is_eos else "<pad>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([first, BOS, EOS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else first,
        unk_token=first if pad_is_eos else None,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(
    path: str | Path,
    *,
    family: str = "llama",
    vocab_size: int = TINY_VOCAB,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    std: float = 0.02,
    seed: int = 0,
    pad_is_eos: bool = False,
    overrides: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write the folder of a causal language model of 512 positions, in fp32.

    The same arguments give the same bytes.

    Args:
        path: the folder to write.
        family: a family of ``dschat.models.families``.
        vocab_size: rows of the embedding.
        hidden: width of the model.
        layers: number of decoder layers.
        heads: number of attention heads.
        kv_heads: key and value heads of the families with grouped queries (llama, qwen2, mistral).
        std: standard deviation of the weights. At the usual 0.02 a model this small repeats one or
            two tokens whatever is done to it; at 0.5 its answers vary and react to every fault.
        seed: seed of the weights.
        pad_is_eos: the tokenizer pads with </s>, as many published ones do.
        overrides: further entries of the configuration, by transformers' names.

    Raises:
        ValueError: the family is unknown, or the sizes do not fit together.
    """
    if family not in FAMILIES:
        raise ValueError(f"--family {family!r} is unknown; choose from {', '.join(FAMILIES)}.")
    tokenizer = byte_tokenizer(pad_is_eos=pad_is_eos, add_bos=family in ("opt", "llama", "mistral"))
    if vocab_size < len(tokenizer):
        raise ValueError(
            f"--vocab_size {vocab_size} is less than the tokenizer's {len(tokenizer)} tokens."
        )
    if hidden % heads or heads % kv_heads:
        raise ValueError(
            f"--hidden {hidden} must be a multiple of --heads {heads}, and --heads of "
            f"--kv_heads {kv_heads}."
        )
    config = tiny_shape(
        family, vocab=vocab_size, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads
    ).config()
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=tokenizer.pad_token_id)
    std_name = "init_std" if hasattr(config, "init_std") else "initializer_range"
    for name, value in {**ids, std_name: std, **(overrides or {})}.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ids)
    path = Path(path)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    apply_umask(path)
    return path
