"""Rewards from anywhere: reward models, with the actor's tokenizer or their own, and Python functions."""

import importlib.util
import inspect
import math
import numbers
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dschat.algorithms.masks import pool_last
from dschat.data.encoding import Encoder
from dschat.data.messages import plain_text
from dschat.runtime import dist
from dschat.runtime.paths import user_path
from dschat.trainers.rollout import SampledAnswers

CONTEXT_TOKENS = 4  # of a prompt, to decode its answer after them
BLAME_S = 10.0  # seconds to look for the answer on which a function fails


class RewardFailure(ValueError):
    """A reward that raised, or returned something else than one finite number for each answer."""


@dataclass(frozen=True)
class AnswerTexts:
    """The same answers as text, for rewards that do not read the actor's token ids."""

    prompts: list[str]  # B prompts as rendered
    answers: list[str]  # B answers, without special tokens
    rows: list  # B rows of the data set
    ended: list[bool]  # B, True where the answer ended by itself


class Reward(Protocol):
    """One source of scores."""

    name: str

    def __call__(self, answers: SampledAnswers, texts: Callable[[], AnswerTexts]) -> torch.Tensor:
        """[B] fp32 scores."""


class ModelReward:
    """A reward model that reads the actor's own token ids."""

    def __init__(self, engine, name: str):
        self.engine, self.name = engine, name

    def __call__(self, answers: SampledAnswers, texts) -> torch.Tensor:
        values = self.engine(input_ids=answers.input_ids, attention_mask=answers.attention_mask)
        return pool_last(values, answers.attention_mask)


class RetokenisedReward:
    """A reward model with another tokenizer: answers are rendered as text and tokenised again.

    The end token follows an answer only where the policy ended it, as in training.
    """

    def __init__(
        self, engine, name: str, tokenizer, *, prompt_format: str, max_tokens: int | None = None
    ):
        """
        Args:
            max_tokens: longer texts lose their beginning, since the end is what is scored; None: no limit.
        """
        self.engine = engine
        self.name = name
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, prompt_format=prompt_format)
        self.max_tokens = max_tokens

    def __call__(self, answers: SampledAnswers, texts) -> torch.Tensor:
        known, ids, failure = texts(), [], None
        for row, answer, ended in zip(known.rows, known.answers, known.ended):
            try:
                ids.append(self._ids(row, answer, ended))
            except RewardFailure as error:
                failure = failure or error
                ids.append([self.tokenizer.eos_token_id])
        longest = max(len(row) for row in ids)
        device = answers.input_ids.device
        mask = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device
        )
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=device)
        # Also where an answer cannot be shown: under ZeRO-3 the others gather weights in this forward, and would wait there.
        values = self.engine(input_ids=tokens, attention_mask=mask)
        if failure is not None:
            raise failure
        return pool_last(values, mask)

    def _ids(self, row, answer: str, ended: bool) -> list[int]:
        try:
            ids = self.encoder.encode_answer(row, answer or " ", ended=ended)
        except ValueError as error:
            reason = str(error).replace("--prompt_format", "--reward_prompt_format")
            raise RewardFailure(
                f"{self.name} cannot be shown the prompt {row.prompt!r}: {reason}"
            ) from error
        return ids[-self.max_tokens :] if self.max_tokens else ids


class FunctionReward:
    """A Python function of prompts, answers and the data set's further columns."""

    def __init__(self, function: Callable, name: str):
        self.function, self.name = function, name
        # A column with the name of one of these is passed under another name.
        self._taken = {"prompts", "answers", *list(inspect.signature(function).parameters)[:2]}

    def __call__(self, answers: SampledAnswers, texts) -> torch.Tensor:
        known = texts()
        columns: dict[str, list] = {}
        for name in {name for row in known.rows for name in row.columns}:
            key = f"{name}_column" if name in self._taken else name
            columns[key] = [row.columns.get(name) for row in known.rows]
        if all(row.chosen is not None for row in known.rows):
            columns.setdefault("chosen", [plain_text(row.chosen) for row in known.rows])
        try:
            scores = self.function(known.prompts, known.answers, **columns)
        except (Exception, SystemExit) as error:
            raise RewardFailure(self._blame(known, columns, error)) from error
        scores = (
            scores.tolist() if hasattr(scores, "tolist") else scores
        )  # numpy arrays and tensors
        if not hasattr(scores, "__len__") or len(scores) != len(known.answers):
            count = len(scores) if hasattr(scores, "__len__") else type(scores).__name__
            raise RewardFailure(
                f"--reward_fn {self.name} returned {count} scores for {len(known.answers)} answers, the first of them "
                f"to the prompt {known.prompts[0]!r}: return one number for each."
            )
        for score, prompt, answer in zip(scores, known.prompts, known.answers):
            if not _is_finite(score):
                raise RewardFailure(
                    f"--reward_fn {self.name} returned {_shown(score)} for the prompt {prompt!r} and the answer {answer!r}: "
                    "return a finite number."
                )
        return torch.tensor([float(score) for score in scores], device=answers.input_ids.device)

    def _blame(self, known: AnswerTexts, columns: dict[str, list], error: BaseException) -> str:
        """The message for `error`, with the first answer on which the function fails alone, where one is soon found."""
        culprit, deadline = "", time.monotonic() + BLAME_S
        for i, (prompt, answer) in enumerate(zip(known.prompts, known.answers)):
            if time.monotonic() > deadline:  # a function that waits for a server, say
                break
            try:
                self.function(
                    [prompt], [answer], **{name: [values[i]] for name, values in columns.items()}
                )
            except (Exception, SystemExit):
                culprit = f" on the prompt {prompt!r} and the answer {answer!r}"
                break
        culprit = (
            culprit
            or f" on {len(known.answers)} answers, the first of them to the prompt {known.prompts[0]!r}"
        )
        return f"--reward_fn {self.name} raised {type(error).__name__}: {error}{culprit}."


class WeightedRewards:
    """The weighted sum of several rewards."""

    def __init__(self, rewards: list[Reward], weights: list[float], dataset, tokenizer):
        """
        Args:
            weights: one a reward; empty: 1 each.
            dataset: prompts by row number: ``prompt_text(i)`` and ``row(i)``.
            tokenizer: the actor's.
        """
        self.rewards, self.weights = rewards, weights or [1.0] * len(rewards)
        self.dataset, self.tokenizer = dataset, tokenizer

    def __call__(self, answers: SampledAnswers) -> torch.Tensor:
        """[B] fp32.

        Raises:
            RewardFailure: on every process, where a reward failed on any of them.
        """
        total, failure, known = (
            torch.zeros(len(answers.ended), device=answers.ended.device),
            None,
            None,
        )

        def texts() -> AnswerTexts:
            nonlocal known
            known = known or self._texts(answers)
            return known

        with torch.no_grad():
            for reward, weight in zip(self.rewards, self.weights):
                try:
                    total = total + weight * reward(answers, texts)
                except RewardFailure as error:
                    failure = error
        if not torch.isfinite(total).all() and failure is None:
            bad = int((~torch.isfinite(total)).nonzero()[0])
            failure = RewardFailure(
                f"the score of the answer {texts().answers[bad]!r} to the prompt {texts().prompts[bad]!r} is "
                f"{total[bad].item()}: look at the reward model, or take --dtype bf16 or fp32 instead of fp16."
            )
        # The others must not wait in the next collective for a process that has stopped.
        failed = dist.all_reduce(torch.tensor(int(failure is not None), device=total.device), "max")
        if failure is not None:
            raise failure
        if failed:
            raise RewardFailure("a reward failed on another process, which says why")
        return total

    def _texts(self, answers: SampledAnswers) -> AnswerTexts:
        index = answers.prompts.index.tolist()
        kept = [
            tokens[mask] for tokens, mask in zip(answers.tokens, answers.response_mask, strict=True)
        ]
        return AnswerTexts(
            prompts=[self.dataset.prompt_text(i) for i in index],
            answers=decode_answers(self.tokenizer, answers.prompts.input_ids, kept),
            rows=[self.dataset.row(i) for i in index],
            ended=answers.ended.tolist(),
        )


def decode_answers(tokenizer, prompts: torch.Tensor, answers: list[torch.Tensor]) -> list[str]:
    """Return answers as text, without special tokens.

    Args:
        tokenizer: of the model that wrote them.
        prompts: their prompts [B, P], padded on the left.
        answers: B tensors of token ids.
    """
    # Decoders of SentencePiece drop the space of a text's first word: decode it after the prompt.
    before = prompts[:, -CONTEXT_TOKENS:]
    joint = [torch.cat([ids, answer]) for ids, answer in zip(before, answers, strict=True)]
    heads = tokenizer.batch_decode(before, skip_special_tokens=True)
    wholes = tokenizer.batch_decode(joint, skip_special_tokens=True)
    alone = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        whole[len(head) :] if whole.startswith(head) else text
        for head, whole, text in zip(heads, wholes, alone, strict=True)
    ]


def _is_finite(score: object) -> bool:
    try:
        return isinstance(score, numbers.Real) and math.isfinite(score)
    except OverflowError:  # a whole number beyond every float
        return False


def _shown(score: object) -> str:
    """A score in at most 60 characters."""
    try:
        return f"{score!r:.60}"
    except ValueError:  # Python writes no whole numbers of thousands of digits
        return f"a {type(score).__name__} of too many digits"


def load_function(name: str) -> Callable:
    """The function that "file.py:function" names.

    Raises:
        ValueError: no such file or function, or the file does not run; names --reward_fn.
    """
    file, _, function = name.rpartition(":")
    path = user_path(file)
    if not path.is_file():
        raise ValueError(f"--reward_fn {name}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--reward_fn {name}: {path} does not run: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"--reward_fn {name}: {path} has no function {function}.")
    return found


def same_tokens(tokenizer, other) -> bool:
    """Return whether every token of `tokenizer` has the same id in `other`, which may have more."""
    known = other.get_vocab()
    return all(known.get(token) == index for token, index in tokenizer.get_vocab().items())


def reads_actor_tokens(tokenizer, other, *, prompt_format: str, reward_prompt_format: str) -> bool:
    """Return whether a reward model with the tokenizer `other` reads the very tokens that the actor, with `tokenizer`, has
    read and written: the same ids, ends and chat template, and no prompt format of its own.
    """
    return (
        same_tokens(tokenizer, other)
        and other.eos_token_id == tokenizer.eos_token_id
        and other.chat_template == tokenizer.chat_template
        and reward_prompt_format in ("auto", prompt_format)
    )


def check_critic_tokenizer(tokenizer, critic_tokenizer, path: str) -> None:
    """The critic reads the actor's token ids, so it must know them.

    Raises:
        ValueError: it does not; names --critic_model_name_or_path.
    """
    if not same_tokens(tokenizer, critic_tokenizer):
        raise ValueError(
            f"--critic_model_name_or_path {path}: its tokenizer ({len(critic_tokenizer)} tokens) is not the actor's "
            f"({len(tokenizer)} tokens), and in step 3 a critic reads the actor's tokens. Name this model by "
            "--reward_model_name_or_path, where answers are tokenised again, and let the critic start from the actor "
            "or from a reward model with its tokenizer."
        )
