"""The reward model, also used as the critic: one value at every token.

It is a transformers sequence classifier with one label, or for families without one the same head
on the backbone (classifiers.py). A saved model loads anywhere as
AutoModelForSequenceClassification, whose forward gives the score at the last token that is not
padding.
"""

import logging
import re
import zipfile
from pathlib import Path
from typing import Optional

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from dschat.models.adapters import adapter_has_head
from dschat.models.causal_lm import add_tokens, load_config, merge_if_adapter
from dschat.models.classifiers import ensure_classifier
from dschat.models.folder_checks import check_finite
from dschat.models.forward import packed_inputs, position_ids_from_mask, takes_position_ids
from dschat.models.structure import SCORE_HEAD
from dschat.models.tokenizer import as_ids, ensure_unambiguous_pad
from dschat.models.vocabulary import check_vocabulary
from dschat.models.weights import refuse_damaged_weights, require_complete, update_weight

logger = logging.getLogger(__name__)

# Names of the base model and the head in DeepSpeed-Chat's checkpoints.
DEEPSPEED_CHAT_BASE = "rwtransformer."
DEEPSPEED_CHAT_HEAD = "v_head.weight"


class RewardModel(nn.Module):
    """A value for every position: the score head on the base model's last hidden states.

    Args:
        model: a decoder-only sequence classifier with one label and a head without bias.

    Raises:
        ValueError: the head has another name, a bias, or more than one label.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        head = getattr(model, SCORE_HEAD, None)
        if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
            raise ValueError(
                f"{type(model).__name__} cannot be a reward model here: it needs one linear head "
                f"named {SCORE_HEAD!r}, with one output and no bias, on every token of a decoder, "
                f"and has {head}."
            )
        self.model = model
        self._takes_position_ids = takes_position_ids(model)
        self.reward_head: Optional[nn.Linear] = None
        self.use_reward_head = False

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the transformers model."""
        return self.model.config

    def keep_reward_head(self, weight: torch.Tensor) -> None:
        """Keep a second, frozen head with this `weight` [1, hidden], used if ``use_reward_head``.

        A critic that shares its body with the reward model trains its own head. This one is not
        part of the transformers model and is not saved.
        """
        with torch.device("meta"):
            self.reward_head = nn.Linear(weight.shape[1], 1, bias=False)
        self.reward_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor],
        position_ids: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return the values [B, T] in fp32; those at padding are meaningless.

        Args:
            input_ids: [B, T] int64, padded on either side. An id beyond the embedding is read as
                the last one: an actor's vocabulary may be padded to more rows than this one's, and
                it may sample ids of padding rows.
            attention_mask: [B, T], 1 where a token counts. None: padding is on the right, where no
                token sees it.
            position_ids: [B, T] int64; by default they count the attended tokens. Without
                `attention_mask` those of rows that hold several texts; see ``PackedBatch``.
        """
        known = input_ids.clamp(max=self.model.get_input_embeddings().num_embeddings - 1)
        inputs = dict(input_ids=known, use_cache=False)
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if attention_mask is not None and self._takes_position_ids:
            inputs["position_ids"] = (
                position_ids_from_mask(attention_mask) if position_ids is None else position_ids
            )
        if attention_mask is None and position_ids is not None:
            inputs |= packed_inputs(self.model, position_ids)
        hidden = self.model.base_model(**inputs).last_hidden_state
        head = self.reward_head if self.use_reward_head else self.model.score
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    dropout: Optional[float] = None,
    trust_remote_code: bool = False,
    flag: str = "--model_name_or_path",
    fresh_head: bool = True,
) -> RewardModel:
    """Load a reward model from one of three sources.

    - A sequence classifier, ours or a public one, with its head.
    - A causal language model. It gets a new head drawn from N(0, 1 / (hidden + 1)) (Stiennon et al.
      2020, Learning to summarize from human feedback, appendix B.1), reproducible by the torch
      seed.
    - A DeepSpeed-Chat reward checkpoint: config.json, and pytorch_model.bin with rwtransformer.*
      and v_head.

    A PEFT adapter folder is merged into its base, one of the three; the head may be the adapter's.

    `tokenizer` is changed in place if its padding token could occur in a text (see
    ensure_unambiguous_pad), and the vocabulary grows with it.

    Args:
        path: a model folder, an adapter folder or a hub name.
        dtype: of the weights.
        tokenizer: of the same model; may change, see above.
        dropout: set as every dropout probability; None keeps the model's own.
        trust_remote_code: allow Python code that comes with the model.
        flag: the command-line flag that `path` came from, for messages.
        fresh_head: allow a causal language model. Pass False to use scores without training, when a
            random head is an error.

    Raises:
        ValueError: nothing there, incomplete, more than one label, a head that is missing or
            unusable, or (DeepSpeed-Chat) any weight that is missing, left over or of another shape.
    """
    source, config = load_config(
        path, flag=flag, trust_remote_code=trust_remote_code, dropout=dropout
    )
    ensure_classifier(config)
    old_checkpoint = _find_head(path, source, config, flag=flag, fresh_head=fresh_head)
    config.num_labels = 1
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, path=path, flag=flag)
    if old_checkpoint is not None:
        model = _load_deepspeed_chat(
            old_checkpoint, config=config, dtype=dtype, path=path, flag=flag
        )
    else:
        loading = dict(dtype=dtype, trust_remote_code=trust_remote_code)
        model = _load_classifier(
            source,
            loading,
            config=config,
            fresh_head=not _is_classifier(config),
            path=path,
            flag=flag,
        )
    merge_if_adapter(model, path, flag=flag)
    check_finite(model, path=path, flag=flag)
    end_ids = as_ids(config.eos_token_id) | _generation_end_ids(source)
    pad_token_id = ensure_unambiguous_pad(tokenizer, end_ids=end_ids)
    add_tokens(model, tokenizer)
    # Set last: an embedding takes the id as its padding_idx when built, and may be too small then.
    model.config.pad_token_id = pad_token_id
    return RewardModel(model)


def check_reward_model(path: str, *, flag: str, trust_remote_code: bool = False) -> None:
    """Check, without loading weights, that a model scores texts: that it has a reward head.

    Raises:
        ValueError: nothing there, incomplete, more than one label, or no head.
    """
    source, config = load_config(path, flag=flag, trust_remote_code=trust_remote_code)
    _find_head(path, source, config, flag=flag, fresh_head=False)


def _is_classifier(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of a sequence classifier."""
    return next(iter(config.architectures or ()), "").endswith("ForSequenceClassification")


def _find_head(
    path: str, source: str, config: PreTrainedConfig, *, flag: str, fresh_head: bool
) -> Optional[dict[str, torch.Tensor]]:
    """Check that a model has a reward head, unless it may get one.

    Args:
        path: as given by the user.
        source: of ``load_config``, as is `config`.
        flag: the command-line flag that `path` came from, for messages.
        fresh_head: allow a causal language model.

    Returns:
        The tensors of a DeepSpeed-Chat reward checkpoint; None for other sources.

    Raises:
        ValueError: more than one label, damaged weights, or no head.
    """
    if _is_classifier(config) and config.num_labels != 1:
        raise ValueError(
            f"{flag} {path!r} is a classifier with {config.num_labels} labels; a reward model has "
            "one. Give a reward model, or a causal language model to train one from."
        )
    with refuse_damaged_weights(path, flag=flag):
        old_checkpoint = _deepspeed_chat_tensors(source)
    has_head = old_checkpoint is not None or _is_classifier(config)
    if not (has_head or fresh_head or adapter_has_head(path, flag=flag)):
        raise ValueError(
            f"{flag} {path!r} is a language model without a reward head, and its scores would be "
            "random. Give a sequence classifier with one label, such as step 2 saves."
        )
    return old_checkpoint


def _generation_end_ids(source: str) -> set[int]:
    """Return the end-of-sequence ids in a folder's generation_config.json, if it has one."""
    if not (Path(source) / "generation_config.json").is_file():
        return set()
    return as_ids(GenerationConfig.from_pretrained(source).eos_token_id)


def _load_classifier(
    source: str, loading: dict, *, config: PreTrainedConfig, fresh_head: bool, path: str, flag: str
) -> PreTrainedModel:
    """Load a sequence classifier; its head alone is newly initialised if `fresh_head`."""
    generator = torch.Generator().set_state(torch.get_rng_state())
    with refuse_damaged_weights(path, flag=flag):
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **loading,
            )
        except ValueError as error:
            # transformers' message lists all classes that it has.
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{flag} {path!r} cannot be a reward model: {reason} Give a decoder-only language "
                "model whose backbone is part of transformers, or a reward model."
            ) from error
    require_complete(
        model, info, path=path, flag=flag, fresh=[f"{SCORE_HEAD}.weight"] if fresh_head else []
    )
    if fresh_head and isinstance(getattr(model, SCORE_HEAD, None), nn.Linear):
        width = _draw_head(model.score.weight, generator)
        logger.info(
            "%s %s: the reward head is new, drawn with standard deviation 1/sqrt(%d)",
            flag,
            path,
            width + 1,
        )
    return model


def _draw_head(weight: torch.Tensor, generator: torch.Generator) -> int:
    """Draw a head [1, hidden] from N(0, 1 / (hidden + 1)), and return hidden.

    The values are the same under every ZeRO stage: transformers draws a partitioned weight after
    other random numbers than a whole one. The global generator continues after them.

    Args:
        weight: the head's weight, which ZeRO-3 may have partitioned; every rank must call this.
        generator: on the CPU.
    """
    shape = getattr(weight, "ds_shape", weight.shape)
    drawn = torch.empty(shape, dtype=weight.dtype).normal_(
        std=(shape[1] + 1) ** -0.5, generator=generator
    )
    update_weight(weight, lambda old: drawn.to(old.device))
    torch.set_rng_state(generator.get_state())
    return int(shape[1])


def _deepspeed_chat_tensors(source: str) -> Optional[dict[str, torch.Tensor]]:
    """Return the tensors of a DeepSpeed-Chat reward checkpoint; None for other sources."""
    optional = dict(
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if any(
        cached_file(source, name, **optional)
        for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        return None
    checkpoint = cached_file(source, "pytorch_model.bin", **optional)
    if checkpoint is None:
        return None
    # Memory-mapped: of another model, with many gigabytes, only the names are read.
    tensors = torch.load(
        checkpoint, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(checkpoint)
    )
    return tensors if any(name.startswith(DEEPSPEED_CHAT_BASE) for name in tensors) else None


def _load_deepspeed_chat(
    tensors: dict[str, torch.Tensor],
    *,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    path: str,
    flag: str,
) -> PreTrainedModel:
    """Build the sequence classifier of a DeepSpeed-Chat checkpoint; all weights must fit."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{flag} {path!r}: transformers has no sequence classifier for {type(config).__name__}."
        )
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    base = re.compile(f"^{re.escape(DEEPSPEED_CHAT_BASE)}")
    renamed = {
        base.sub(f"{model_class.base_model_prefix}.", name): tensor
        for name, tensor in tensors.items()
    }
    if DEEPSPEED_CHAT_HEAD in renamed:
        renamed[f"{SCORE_HEAD}.weight"] = renamed.pop(DEEPSPEED_CHAT_HEAD)
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=renamed,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # Buffers that old versions of transformers saved and new ones compute.
    known = [r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]
    left_over = {
        name
        for name in set(renamed) - set(model.state_dict())
        if not any(re.search(pattern, name) for pattern in known)
    }
    require_complete(model, info, path=path, flag=flag, left_over=left_over)
    return model
