"""Differences between model families, and the shapes of published models.

All other modules find a model's parts by structure (base model, decoder list, heads), so a family
that is not listed here works too. The shapes let planning and benchmarks build a configuration
without any download.
"""

from dataclasses import dataclass
from typing import Any, Optional

from transformers import (
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

# Modules outside the decoder list that belong to the input embedding but are not an nn.Embedding:
# OPT-350m widens its 512 embedding columns to 1024, BLOOM normalises them.
EMBEDDING_MODULE_NAMES = ("project_in", "word_embeddings_layernorm")

# Linear layers of one module that read the same input, in the order in which forwards call them. A
# decode step computes them in one launch. Families with other names only lose that.
SHARED_INPUT_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Families whose recurrent layers read padding on the left as if it were text.
READS_LEFT_PADDING = ("recurrent_gemma",)

# Families for which transformers (5.17) makes no block-diagonal mask of the position ids of packed
# texts: they get the mask itself.
PACKED_BY_MASK = ("opt",)


@dataclass(frozen=True)
class Shape:
    """The sizes of one model; enough to build it and to count its parameters."""

    family: str  # transformers' model_type
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    tied: bool  # the output head shares the input embedding
    kv_heads: Optional[int] = None  # None: as many as heads
    # OPT: width of the embedding and of the head; None: hidden.
    word_embed_proj_dim: Optional[int] = None
    norm_before: bool = True  # OPT-350m alone normalises after each block and has no final norm
    rope_theta: float = 10000.0

    def config(self) -> PreTrainedConfig:
        """Return the transformers configuration of this shape.

        Dropout and token ids stay the family's defaults.
        """
        sizes = dict(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=self.tied,
        )
        kv_heads = self.kv_heads or self.heads
        if self.family == "opt":
            return OPTConfig(
                **sizes,
                ffn_dim=self.intermediate,
                word_embed_proj_dim=self.word_embed_proj_dim or self.hidden,
                do_layer_norm_before=self.norm_before,
            )
        if self.family == "gpt2":
            # The default ids are outside a small vocabulary.
            return GPT2Config(
                **sizes, n_inner=self.intermediate, bos_token_id=None, eos_token_id=None
            )
        if self.family == "bloom":
            return BloomConfig(
                vocab_size=self.vocab,
                hidden_size=self.hidden,
                n_layer=self.layers,
                n_head=self.heads,
                tie_word_embeddings=self.tied,
            )
        if self.family == "gpt_neox":
            return GPTNeoXConfig(**sizes, intermediate_size=self.intermediate)
        rotary = dict(intermediate_size=self.intermediate, num_key_value_heads=kv_heads)
        rope = dict(rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta})
        if self.family == "llama":
            return LlamaConfig(**sizes, **rotary, **rope)
        if self.family == "qwen2":
            return Qwen2Config(**sizes, **rotary, **rope)
        if self.family == "mistral":
            return MistralConfig(**sizes, **rotary, **rope, sliding_window=None)
        raise ValueError(
            f"family {self.family!r} has no configuration here; known: {', '.join(FAMILIES)}"
        )


FAMILIES = ("opt", "llama", "gpt2", "gpt_neox", "qwen2", "mistral")


def _opt(hidden: int, layers: int, heads: int, **more) -> Shape:
    """Return a shape of OPT (Zhang et al. 2022, table 1), with the checkpoints' 50272 rows."""
    sizes: dict[str, Any] = dict(intermediate=4 * hidden, vocab=50272, positions=2048, tied=True)
    return Shape("opt", hidden, layers, heads, **sizes, **more)


def _llama2(hidden: int, layers: int, heads: int, intermediate: int, **more) -> Shape:
    """Return a shape of Llama 2 (Touvron et al. 2023)."""
    return Shape(
        "llama",
        hidden,
        layers,
        heads,
        intermediate,
        vocab=32000,
        positions=4096,
        tied=False,
        **more,
    )


def tiny_shape(
    family: str, *, vocab: int, hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Shape:
    """Return the shape of a model for tests.

    OPT and GPT-2 are tied and the others are not, like their published models. `kv_heads` is
    ignored unless the family has grouped-query attention.
    """
    grouped = family in ("llama", "qwen2", "mistral")
    return Shape(
        family,
        hidden,
        layers,
        heads,
        intermediate=2 * hidden if grouped else 4 * hidden,
        vocab=vocab,
        positions=512,
        tied=family in ("opt", "gpt2"),
        kv_heads=kv_heads if grouped else None,
    )


# Three special tokens and 256 bytes, rounded up to a multiple of 8 as in large models.
TINY_VOCAB = 264

SHAPES: dict[str, Shape] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-7b": _llama2(4096, 32, 32, 11008),
    "llama-2-13b": _llama2(5120, 40, 40, 13824),
    "llama-2-70b": _llama2(8192, 80, 64, 28672, kv_heads=8),
    # Llama 3 (Grattafiori et al. 2024, table 3).
    "llama-3-8b": Shape(
        "llama",
        4096,
        32,
        32,
        14336,
        vocab=128256,
        positions=8192,
        tied=False,
        kv_heads=8,
        rope_theta=500000.0,
    ),
    # Base models of DeepSpeed-Chat's scripts for other languages, and its own checkpoints.
    "bloom-1b1": Shape("bloom", 1536, 24, 16, 6144, vocab=250880, positions=2048, tied=True),
    "mgpt": Shape("gpt2", 2048, 24, 16, 8192, vocab=100000, positions=2048, tied=True),
    "chat-opt-1.3b-sft-deepspeed": _opt(2048, 24, 32),
    "chat-opt-350m-reward-deepspeed": _opt(
        1024, 24, 16, word_embed_proj_dim=512, norm_before=False
    ),
    "smollm2-135m": Shape(
        "llama",
        576,
        30,
        9,
        1536,
        vocab=49152,
        positions=8192,
        tied=True,
        kv_heads=3,
        rope_theta=100000.0,
    ),
    **{f"tiny-{family}": tiny_shape(family, vocab=TINY_VOCAB) for family in FAMILIES},
}


def shape_config(name: str) -> PreTrainedConfig:
    """Return the configuration of a published or tiny model, without a download.

    Args:
        name: a key of SHAPES in any case, with or without its organisation ("facebook/opt-1.3b").

    Raises:
        ValueError: the name is unknown; the known ones are listed.
    """
    short = name.rsplit("/", 1)[-1].lower().removesuffix("-hf").removesuffix("-instruct")
    if short not in SHAPES:
        raise ValueError(f"no shape named {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[short].config()
