"""Forward passes over prompts with answers, and the two layouts of such rows.

Rollouts pad prompts on the left and answers on the right, so that all answers begin in one column.
Micro-batches of like length hold aligned rows instead: each begins in the first column, so that a
batch is as wide as its longest row, and attention needs no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
import torch.nn.functional as F

from dschat.algorithms.logprobs import token_logprobs
from dschat.algorithms.types import Experience, Movable
from dschat.models.forward import forward_logits


class AnswerBatch(Protocol):
    """Prompts with answers, such as an ``Experience`` or ``SampledAnswers``."""

    @property
    def input_ids(self) -> torch.Tensor:
        """Tokens [B, P + R] int64, prompts padded on the left and answers on the right."""

    @property
    def attention_mask(self) -> torch.Tensor:
        """Mask [B, P + R] int64, 1 on prompt and answer tokens."""

    @property
    def response_mask(self) -> torch.Tensor:
        """Mask [B, R] bool, True on answer tokens."""


@dataclass(frozen=True)
class AlignedTexts(Movable):
    """Prompts with answers that begin in the first column, padded on the right to T tokens.

    The last K columns are those from the shortest prompt's last token on.
    """

    input_ids: torch.Tensor  # [B, T] int64
    attention_mask: torch.Tensor  # [B, T] int64
    targets: torch.Tensor  # [B, K] int64, the token after each of the last K columns
    places: torch.Tensor  # [B, R] int64, which of the K columns predicts each answer token


@dataclass(frozen=True)
class AlignedExperience(Experience, AlignedTexts):
    """A micro-batch of ``Experience`` with aligned rows."""


def row_lengths(batch: AnswerBatch) -> list[tuple[int, int]]:
    """Return the tokens of each row's prompt and answer, which takes one transfer from a GPU."""
    answers = batch.response_mask.sum(-1)
    prompts = batch.attention_mask.sum(-1) - answers
    return list(zip(*torch.stack([prompts, answers]).tolist(), strict=True))


def align(batch: AnswerBatch, lengths: Sequence[tuple[int, int]]) -> AlignedTexts:
    """Return the rows with their first token in the first column.

    Args:
        batch: of these rows.
        lengths: the tokens of each row's prompt and answer; see ``row_lengths``.
    """
    ids = batch.input_ids
    num_prompt = ids.shape[1] - batch.response_mask.shape[1]
    prompts, texts = torch.tensor([(prompt, prompt + answer) for prompt, answer in lengths]).T.to(
        ids.device, non_blocking=True
    )
    width = max(prompt + answer for prompt, answer in lengths)
    columns = torch.arange(width, device=ids.device)
    is_text = columns < texts[:, None]
    places = columns + num_prompt - prompts[:, None]
    aligned = torch.where(is_text, ids.gather(1, places.clamp(max=ids.shape[1] - 1)), 0)
    first = min(prompt for prompt, _ in lengths) - 1
    longest = max(answer for _, answer in lengths)
    predicting = prompts[:, None] - 1 - first + torch.arange(longest, device=ids.device)
    return AlignedTexts(
        input_ids=aligned,
        attention_mask=is_text.long(),
        targets=F.pad(aligned[:, first + 1 :], (0, 1)),
        places=predicting.clamp(max=width - first - 1),
    )


def align_experience(
    experience: Experience, lengths: Sequence[tuple[int, int]]
) -> AlignedExperience:
    """Return a micro-batch with aligned rows, without columns that are padding in every row.

    Args:
        experience: of these rows.
        lengths: the tokens of each row's prompt and answer; see ``row_lengths``.
    """
    texts = align(experience, lengths)
    longest = max(answer for _, answer in lengths)
    columns = _cut_answers(experience, longest)
    return AlignedExperience(**(columns | {f.name: getattr(texts, f.name) for f in fields(texts)}))


def trim(experience: Experience, lengths: Sequence[tuple[int, int]]) -> Experience:
    """Remove columns that are padding in every row: losses stay the same, forwards get shorter.

    Args:
        experience: of these rows.
        lengths: the tokens of each row's prompt and answer; see ``row_lengths``.
    """
    num_prompt = experience.input_ids.shape[1] - experience.response_mask.shape[1]
    prompts, answers = zip(*lengths, strict=True)
    kept = slice(num_prompt - max(prompts), num_prompt + max(answers))
    columns = _cut_answers(experience, max(answers))
    for name in ("input_ids", "attention_mask"):
        columns[name] = columns[name][:, kept]
    return Experience(**columns)


def _cut_answers(experience: Experience, longest: int) -> dict[str, torch.Tensor]:
    """Return all tensors by name, those of answers with their first `longest` columns."""
    columns = {}
    for name, tensor in vars(experience).items():
        whole = name in ("input_ids", "attention_mask") or tensor.dim() < 2
        columns[name] = tensor if whole else tensor[:, :longest]
    return columns


def answer_logits(
    engine, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_answer_tokens: int
) -> torch.Tensor:
    """Return the logits [B, R, V] that predict the last R tokens of `input_ids` [B, P + R].

    R is `num_answer_tokens`.
    """
    logits = forward_logits(
        engine,
        engine.module,
        input_ids=input_ids,
        attention_mask=attention_mask,
        logits_to_keep=num_answer_tokens + 1,
    )
    return logits[:, :-1]


def answer_logprobs(
    engine, batch: AnswerBatch | AlignedTexts, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logprob of each answer token and the entropy of its distribution, both [B, R].

    Args:
        engine: holds the language model.
        batch: of B rows, in either layout.
        temperature: the logits are divided by it first, as in sampling.
    """
    if isinstance(batch, AlignedTexts):
        logits = forward_logits(
            engine,
            engine.module,
            input_ids=batch.input_ids,
            attention_mask=None,
            logits_to_keep=batch.targets.shape[1],
        )
        logprobs, entropy = token_logprobs(logits, batch.targets, temperature=temperature)
        return logprobs.gather(1, batch.places), entropy.gather(1, batch.places)
    num_tokens = batch.response_mask.shape[1]
    logits = answer_logits(engine, batch.input_ids, batch.attention_mask, num_tokens)
    return token_logprobs(logits, batch.input_ids[:, -num_tokens:], temperature=temperature)


def answer_values(engine, batch: AnswerBatch | AlignedTexts) -> torch.Tensor:
    """Return the values V(s_t) [B, R], each read one position before token t.

    Args:
        engine: holds the critic.
        batch: of B rows, in either layout.
    """
    values = text_values(engine, batch)
    if isinstance(batch, AlignedTexts):
        return values[:, -batch.targets.shape[1] :].gather(1, batch.places)
    return values[:, -batch.response_mask.shape[1] - 1 : -1]


def text_values(engine, batch: AnswerBatch | AlignedTexts) -> torch.Tensor:
    """Return a reward model's values at every position [B, T], in either layout."""
    mask = None if isinstance(batch, AlignedTexts) else batch.attention_mask
    return engine(input_ids=batch.input_ids, attention_mask=mask)
