"""Sequence classifiers for families for which transformers has none.

The class is transformers' own generic one, a head named score on the backbone, as Llama's and
Qwen2's classifiers are. A saved folder is therefore in transformers' format, and any program that
defines the same class loads it (docs/models.md).
"""

from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


class HeadOnBackbone(GenericForSequenceClassification):
    """transformers' generic classifier, for backbones that return or take fewer things.

    Recurrent backbones return no attentions and take no positions.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return the scores [B, labels] at the last token of each row that is not padding.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 where a token counts.
            kwargs: of the backbone.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        hidden = self.base_model(input_ids, attention_mask=attention_mask, **given)[0]
        rows, tokens = input_ids.shape
        pad_token_id = getattr(self.config.get_text_config(), "pad_token_id", None)
        if pad_token_id is None and rows > 1:
            raise ValueError("config.json names no padding token: give one text at a time.")
        last = torch.full((rows,), tokens - 1, device=hidden.device)
        if pad_token_id is not None:
            is_text = (input_ids != pad_token_id).long()
            last = (is_text * torch.arange(tokens, device=hidden.device)).argmax(-1)
        scores = self.score(hidden[torch.arange(rows, device=hidden.device), last])
        return SequenceClassifierOutput(logits=scores)


def ensure_classifier(config: PreTrainedConfig) -> None:
    """Register a sequence classifier for the family of `config`, unless transformers has one.

    Without a backbone in transformers (a model that comes with Python code), nothing is registered.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_MAPPING:
        return
    backbone = MODEL_MAPPING[kind]
    if not isinstance(backbone, type):  # several, chosen by the configuration
        return
    # Without exist_ok, transformers ignores what is registered for its own configurations.
    classifier = _classifier_class(backbone, kind)
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)


def _classifier_class(
    backbone: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    """Return the classifier on `backbone`, such as MambaForSequenceClassification on MambaModel."""
    family: Any = next(
        parent
        for parent in backbone.__mro__[1:]
        if issubclass(parent, PreTrainedModel) and parent.__name__.endswith("PreTrainedModel")
    )
    name = backbone.__name__.removesuffix("Model") + "ForSequenceClassification"
    members = dict(
        # transformers reads in this module's source which attention and experts the class can have.
        __module__=backbone.__module__,
        __doc__=f"{backbone.__name__} with a linear head named score on its last hidden states.",
        base_model_prefix=family.base_model_prefix or "model",
        config_class=config_class,
    )
    return type(name, (HeadOnBackbone, family), members)
