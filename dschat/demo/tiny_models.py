"""Miniature models with random weights and a byte-level tokenizer, made without any download."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from dschat.models.families import FAMILIES, TINY_VOCAB, tiny_shape

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MAX_POSITIONS = 512


def byte_tokenizer(*, pad_is_eos: bool = False, add_bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens: a padding (or, with `pad_is_eos`, an unknown) token 0, <s> 1, </s> 2 and the bytes.

    Any text comes back from its ids unchanged.
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
    """Write a causal language model folder of 512 positions in fp32; the same arguments give the same bytes.

    Args:
        kv_heads: for the families with grouped queries (llama, qwen2, mistral).
        std: standard deviation of the weights. At the usual 0.02 a model this small says one or two tokens over and
            over, whatever is done to it; at 0.5 its answers vary and react to every fault.
        pad_is_eos: the tokenizer pads with </s>, as many published ones do.
        overrides: further entries of the configuration, by transformers' names.

    Raises:
        ValueError: an unknown family, or sizes that do not fit together.
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
            f"--hidden {hidden} must be a multiple of --heads {heads}, and that of --kv_heads {kv_heads}."
        )
    config = tiny_shape(
        family, vocab=vocab_size, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads
    ).config()
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=tokenizer.pad_token_id)
    deviation = "init_std" if hasattr(config, "init_std") else "initializer_range"
    for name, value in {**ids, deviation: std, **(overrides or {})}.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ids)
    path = Path(path)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
