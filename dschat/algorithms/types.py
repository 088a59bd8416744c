"""The batches that data, rollout and trainers exchange. All are frozen dataclasses of tensors.

Shapes: B rows, T tokens, P prompt positions, R answer positions. A mask is 1 (or True) on the
positions that count.
"""

from dataclasses import dataclass, fields
from typing import TypeVar

import torch

T = TypeVar("T", bound="Movable")


@dataclass(frozen=True)
class Movable:
    """``to`` and ``rows`` for frozen dataclasses of tensors that share their first dimension."""

    def to(self: T, device: torch.device | str) -> T:
        """Return the same batch with every tensor on `device`."""
        return type(self)(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )

    def rows(self: T, index: torch.Tensor) -> T:
        """Return the rows `index` [N] (int64) of every tensor, as a new batch."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True)
class TextBatch(Movable):
    """Prompt and answer as one text, padded on the right."""

    input_ids: torch.Tensor  # [B, T] int64
    attention_mask: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, -100 on tokens without loss


@dataclass(frozen=True)
class PackedBatch(TextBatch):
    """Several texts in each row, one after the other; none of them sees another.

    The padding on the right of a row is one more text, without labels.
    """

    position_ids: torch.Tensor  # [B, T] int64, 0, 1, 2, ... from the start of each text


@dataclass(frozen=True)
class PairBatch(Movable):
    """Preference pairs, padded on the right.

    Row b of the first half is preferred to row b of the second half.
    """

    input_ids: torch.Tensor  # [2B, T] int64
    attention_mask: torch.Tensor  # [2B, T] int64
    labels: torch.Tensor  # [2B, T] int64, the answers' tokens, and -100 on prompts and padding
    margins: torch.Tensor  # [2B] fp32, how much better the chosen answer is; 0 if unknown


@dataclass(frozen=True)
class PackedPairBatch(PackedBatch):
    """Preference pairs, several texts in each row; N pairs have 2N texts of up to L tokens.

    Text n of the first half is preferred to text n of the second half.
    """

    margins: torch.Tensor  # [2N] fp32, how much better the chosen answer is; 0 if unknown
    places: torch.Tensor  # [2N, L] int64, each text's tokens in the rows one after the other
    text_mask: torch.Tensor  # [2N, L] int64, 1 on the tokens of a text

    def by_text(self, values: torch.Tensor) -> torch.Tensor:
        """Return the `values` [B, T] of the rows' tokens as [2N, L], padded on the right."""
        return values.flatten()[self.places]


@dataclass(frozen=True)
class PromptBatch(Movable):
    """Prompts, padded on the left, ready for generation."""

    input_ids: torch.Tensor  # [B, P] int64
    attention_mask: torch.Tensor  # [B, P] int64
    index: torch.Tensor  # [B] int64, the rows of the data set they came from


@dataclass(frozen=True)
class Experience(Movable):
    """The result of one rollout, which the updates read.

    It is computed once, without gradient, and never changed.
    """

    input_ids: torch.Tensor  # [B, P + R] int64, prompt padded left, answer padded right
    # [B, P + R] int64, 1 on prompt and answer tokens (the closing EOS too)
    attention_mask: torch.Tensor
    # [B, R] bool, True on answer tokens up to and including the first EOS
    response_mask: torch.Tensor
    # [B, R] bool, True on the tokens that are learned: the response mask, less left-out answers
    loss_mask: torch.Tensor
    importance: torch.Tensor  # [B, R] fp32, weight of each token's policy loss, usually 1
    logprobs: torch.Tensor  # [B, R] fp32, of the sampled tokens under the policy that sampled them
    ref_logprobs: torch.Tensor  # [B, R] fp32 (those of the policy without a reference)
    values: torch.Tensor  # [B, R] fp32, the critic's before the update (zeros without a critic)
    rewards: torch.Tensor  # [B, R] fp32, score on the last answer token plus the KL penalty
    advantages: torch.Tensor  # [B, R] fp32, whitened if asked
    returns: torch.Tensor  # [B, R] fp32, advantages before whitening + values
    scores: torch.Tensor  # [B] fp32, in the reward's own units
