"""Rewards: reward models, with the actor's tokenizer or another one, and functions or graders."""

import hashlib
import inspect
import math
import numbers
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from dschat.algorithms.masks import pool_last
from dschat.config.ppo_options import OBJECT_PREFIX
from dschat.data.encoding import Encoder
from dschat.data.messages import plain_text
from dschat.rewards.loading import Caller, is_grader
from dschat.rewards.pool import Call, WorkerFailure, WorkerPool
from dschat.rewards.references import MissingColumn
from dschat.runtime import dist
from dschat.runtime.log import logger
from dschat.runtime.manifest import file_entry
from dschat.runtime.paths import user_path
from dschat.trainers.answers import AlignedTexts, text_values
from dschat.trainers.rollout import SampledAnswers, join_parts, parts_by_length

CONTEXT_TOKENS = 4  # last tokens of a prompt that are decoded together with its answer
LARGEST_SCORE = torch.finfo(torch.float32).max
CULPRIT_SEARCH_S = 10.0  # seconds to look for the answer on which a function fails


class RewardFailure(ValueError):
    """Raised if a reward raises, or does not return one finite number for each answer."""


@dataclass(frozen=True)
class AnswerTexts:
    """The same answers as text, for rewards that do not read the actor's token ids."""

    prompts: list[str]  # B prompts as rendered for the actor
    answers: list[str]  # B answers, without special tokens
    rows: list  # B rows of the data set
    ended: list[bool]  # B; True: the answer ended with an EOS
    token_ids: list[list[int]]  # B answers as the actor's token ids, with the EOS


@dataclass(frozen=True)
class Scores:
    """What one reward gives B answers."""

    values: torch.Tensor  # [B] fp32; 0 if the reward does not apply or has failed
    num_inapplicable: int = 0  # answers that the reward does not apply to
    num_failed: int = 0  # answers on which it failed, with --on_reward_error zero


class Reward(Protocol):
    """One source of scores."""

    name: str

    def __call__(self, answers: SampledAnswers, texts: Callable[[], AnswerTexts]) -> Scores:
        """Return the scores of B answers.

        Args:
            answers: B prompts with answers, as token ids of the actor.
            texts: returns the same answers as text.
        """


class ModelReward:
    """A reward model that reads the actor's token ids."""

    def __init__(self, engine, name: str, *, tokens_per_batch: int = 0):
        """Use the reward model inside `engine`.

        Args:
            engine: holds the reward model.
            name: for messages.
            tokens_per_batch: see ``parts_by_length``.
        """
        self.engine = engine
        self.name = name
        self.tokens_per_batch = tokens_per_batch

    def __call__(self, answers: SampledAnswers, texts) -> Scores:
        """Return the scores of B answers; see ``Reward``."""
        parts = parts_by_length(answers, tokens=self.tokens_per_batch)
        return Scores(join_parts(answers, parts, self._scores))

    def _scores(self, answers: SampledAnswers | AlignedTexts) -> torch.Tensor:
        return pool_last(text_values(self.engine, answers), answers.attention_mask)


class RetokenisedReward:
    """A reward model with another tokenizer: answers are decoded and tokenized again.

    An end token is added only if the policy ended the answer, as in the training of reward models.
    """

    def __init__(
        self, engine, name: str, tokenizer, *, prompt_format: str, max_tokens: int | None = None
    ):
        """Use the reward model inside `engine`.

        Args:
            engine: holds the reward model.
            name: for messages.
            tokenizer: the reward model's.
            prompt_format: how the reward model reads prompts.
            max_tokens: longer texts are cut at the start, since the score is read at the end;
                None: no limit.
        """
        self.engine = engine
        self.name = name
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, prompt_format=prompt_format)
        self.max_tokens = max_tokens

    def __call__(self, answers: SampledAnswers, texts) -> Scores:
        """Return the scores of B answers; see ``Reward``."""
        known = texts()
        ids: list[list[int]] = []
        failure = None
        for row, answer, ended in zip(known.rows, known.answers, known.ended, strict=True):
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
        # Run even after a failure: under ZeRO-3 the other ranks gather weights in this forward and
        # would wait.
        values = self.engine(input_ids=tokens, attention_mask=mask)
        if failure is not None:
            raise failure
        return Scores(pool_last(values, mask))

    def _ids(self, row, answer: str, ended: bool) -> list[int]:
        try:
            ids = self.encoder.encode_answer(row, answer or " ", ended=ended)
        except ValueError as error:
            reason = str(error).replace("--prompt_format", "--reward_prompt_format")
            raise RewardFailure(
                f"The reward model {self.name} cannot read the prompt {row.prompt!r}: {reason}"
            ) from error
        return ids[-self.max_tokens :] if self.max_tokens else ids


class FunctionReward:
    """A Python function of prompts, answers and the other columns of the data set."""

    def __init__(
        self,
        function: Callable,
        name: str,
        *,
        on_error: Literal["stop", "zero"] = "stop",
        pool: WorkerPool | None = None,
    ):
        """Call ``function(prompts, answers, **columns)``.

        Args:
            function: returns a number or None (does not apply) for each answer, or an awaitable of
                these. If it names them as parameters, it also gets `ended`, `token_ids` and
                `conversations` (the prompts as the data has them: texts or messages).
            name: the value of --reward_fn.
            on_error: "stop" raises if the function raises or a score is not finite; "zero" gives
                the answers on which it does so 0.
            pool: processes that call the function; None: it is called in this one.
        """
        self.function = function
        self.name = name
        self.on_error = on_error
        self._pool = pool
        self._call = Caller(function)
        self._has_warned = False
        # A column with one of these names is passed as NAME_column.
        parameters = list(inspect.signature(function).parameters)
        self._extras = {"ended", "token_ids", "conversations"} & set(parameters)
        self._reserved_names = {"prompts", "answers", *parameters[:2], *self._extras}

    def __call__(self, answers: SampledAnswers, texts) -> Scores:
        """Return the scores of B answers; see ``Reward``."""
        known = texts()
        columns = self._columns(known)
        rows = list(range(len(known.answers)))
        parts = [rows]
        if self._pool is not None:  # parts of nearly the same size, one for each worker
            count = min(self._pool.num_workers, len(rows))
            parts = [
                rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)
            ]
        scores: list = []
        for part, outcome in zip(parts, self._run(known, columns, parts), strict=True):
            if isinstance(outcome, MissingColumn):  # no row has it
                raise RewardFailure(f"--reward_fn {self.name}: {outcome}") from outcome
            if isinstance(outcome, BaseException) and self.on_error == "stop":
                message = self._error_message(known, columns, part, outcome)
                raise RewardFailure(message) from outcome
            if isinstance(outcome, BaseException):
                scores += self._scores_by_row(known, columns, part, outcome)
            else:
                scores += self._checked(outcome, known, part)
        return self._finite(scores, known, answers.input_ids.device)

    def _finite(self, scores: list, known: AnswerTexts, device: torch.device) -> Scores:
        """Return the scores as a tensor, with 0 for those that are None or have failed."""
        values = [0.0] * len(scores)
        num_failed = 0
        for i, score in enumerate(scores):
            if _is_finite(score):
                values[i] = float(score)
            elif score is not None:
                self._handle_bad_score(score, known.prompts[i], known.answers[i])
                num_failed += 1
        return Scores(torch.tensor(values, device=device), scores.count(None), num_failed)

    def _columns(self, known: AnswerTexts) -> dict[str, list]:
        columns: dict[str, list] = {}
        for name in {name for row in known.rows for name in row.columns}:
            key = f"{name}_column" if name in self._reserved_names else name
            columns[key] = [row.columns.get(name) for row in known.rows]
        if all(row.chosen is not None for row in known.rows):
            columns.setdefault("chosen", [plain_text(row.chosen) for row in known.rows])
        if "conversations" in self._extras:
            columns["conversations"] = [row.prompt for row in known.rows]
        for name in self._extras - {"conversations"}:
            columns[name] = getattr(known, name)
        return columns

    def _run(
        self, known: AnswerTexts, columns: dict[str, list], parts: list[list[int]]
    ) -> Iterator[Any]:
        """Yield, part by part, what the function returns for these rows, or its exception."""
        calls: list[Call] = []
        for part in parts:
            prompts = [known.prompts[i] for i in part]
            texts = [known.answers[i] for i in part]
            chosen = {name: [values[i] for i in part] for name, values in columns.items()}
            calls.append((prompts, texts, chosen))
        if self._pool is not None:
            yield from self._pool.run(calls)
            return
        for call in calls:
            try:
                outcome = self._call(*call)
            except (Exception, SystemExit) as error:
                outcome = error
            yield outcome

    def _checked(self, scores: Any, known: AnswerTexts, part: list[int]) -> list:
        """Return one score per answer, each a number, None or a mistake.

        Raises:
            RewardFailure: there is not one score per answer; a fault of the function that no
                answer causes.
        """
        if not isinstance(scores, list) or len(scores) != len(part):
            count = len(scores) if isinstance(scores, list) else type(scores).__name__
            raise RewardFailure(
                f"--reward_fn {self.name} returned {count} scores for {len(part)} "
                f"answers, the first of them to the prompt {known.prompts[part[0]]!r}. Return one "
                "number, or None, for each answer."
            )
        return scores

    def _run_singly(
        self, known: AnswerTexts, columns: dict[str, list], part: list[int], error: BaseException
    ) -> Iterator[tuple[int, Any]]:
        """Yield each row of a part that raised `error`, with its own outcome."""
        if len(part) == 1:
            yield part[0], error
            return
        single = [[i] for i in part]
        # Not strict: the caller may stop early.
        yield from zip(part, self._run(known, columns, single), strict=False)

    def _scores_by_row(
        self, known: AnswerTexts, columns: dict[str, list], part: list[int], error: BaseException
    ) -> list:
        """Return the scores of single calls, NaN if one raises; together they raised `error`."""
        scores: list = []
        for i, outcome in self._run_singly(known, columns, part, error):
            if isinstance(outcome, BaseException):
                self._warn_once(
                    f"raised {_error_text(outcome)} on the prompt {known.prompts[i]!r} and the "
                    f"answer {known.answers[i]!r}."
                )
                scores.append(math.nan)
            else:
                scores += self._checked(outcome, known, [i])
        return scores

    def _handle_bad_score(self, score: object, prompt: str, answer: str) -> None:
        """Raise for a score that is no finite number, or warn of it."""
        message = (
            f"returned {_short_repr(score)} for the prompt {prompt!r} and the answer {answer!r}. "
            "Return a finite number, or None if the reward does not apply."
        )
        if self.on_error == "stop":
            raise RewardFailure(f"--reward_fn {self.name} {message}")
        self._warn_once(message)

    def _warn_once(self, message: str) -> None:
        if not self._has_warned:
            logger.warning(
                f"--reward_fn {self.name} {message} Such answers get 0 (--on_reward_error zero); "
                "this is said once, and rewards_failed in the metrics counts them."
            )
        self._has_warned = True

    def _error_message(
        self,
        known: AnswerTexts,
        columns: dict[str, list],
        part: list[int],
        error: BaseException,
    ) -> str:
        """Return the message for `error`, raised on several answers.

        It names the first answer on which the function fails alone, if one is found in time.
        """
        deadline = time.monotonic() + CULPRIT_SEARCH_S
        culprit = (
            f" on {len(part)} answers, the first of them to the prompt {known.prompts[part[0]]!r}"
        )
        for i, outcome in self._run_singly(known, columns, part, error):
            if isinstance(outcome, BaseException):
                culprit = f" on the prompt {known.prompts[i]!r} and the answer {known.answers[i]!r}"
                break
            if time.monotonic() > deadline:  # for example, the function waits for a server
                break
        return f"--reward_fn {self.name} raised {_error_text(error)}{culprit}."


class WeightedRewards:
    """The weighted sum of several rewards."""

    def __init__(self, rewards: list[Reward], weights: list[float], dataset, tokenizer):
        """Set the rewards and their weights.

        Args:
            rewards: the summands.
            weights: one per reward; empty: all 1.
            dataset: gives prompts by row number: ``prompt_text(i)`` and ``row(i)``.
            tokenizer: the actor's.
        """
        self.rewards = rewards
        self.weights = weights or [1.0] * len(rewards)
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.labels = metric_labels([reward.name for reward in rewards])
        self._tally = _new_tally(len(rewards))

    def __call__(self, answers: SampledAnswers) -> torch.Tensor:
        """Return fp32 scores [B]. Every rank must call it.

        Raises:
            RewardFailure: a reward failed on any rank; raised on all of them.
        """
        total = torch.zeros(len(answers.ended), device=answers.ended.device)
        failure = None
        known = None

        def texts() -> AnswerTexts:
            nonlocal known
            known = known or self._texts(answers)
            return known

        with torch.no_grad():
            for i, (reward, weight) in enumerate(zip(self.rewards, self.weights, strict=True)):
                try:
                    scores = reward(answers, texts)
                except RewardFailure as error:
                    failure = error
                    continue
                total = total + weight * scores.values
                self._tally[i] += _tally_of(scores)
        if not torch.isfinite(total).all() and failure is None:
            bad = int((~torch.isfinite(total)).nonzero()[0])
            failure = RewardFailure(
                f"The score of the answer {texts().answers[bad]!r} to the prompt "
                f"{texts().prompts[bad]!r} is {total[bad].item()}. Check the reward model; instead "
                "of --dtype fp16, take bf16 or fp32."
            )
        # Tell the other ranks, which would wait in the next collective.
        failed = dist.all_reduce(torch.tensor(int(failure is not None), device=total.device), "max")
        if failure is not None:
            raise failure
        if failed:
            raise RewardFailure("A reward failed on another rank; see its message.")
        return total

    def pop_metrics(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """Return each reward's mean and rates since the last call. Every rank must call it.

        There are none if a reward model is the only reward: its mean is the score. A reward of
        weight 0 is a judge: it is measured, and not learned from.

        Args:
            device: of the sums over ranks.
        """
        tally = dist.all_reduce(self._tally.to(device)).tolist()
        self._tally = _new_tally(len(self.rewards))
        metrics: dict[str, float] = {}
        for reward, label, row, weight in zip(
            self.rewards, self.labels, tally, self.weights, strict=True
        ):
            total, squares, count, inapplicable, failed = row
            is_function = isinstance(reward, FunctionReward)
            if count == 0 or not (is_function or len(self.rewards) > 1):
                continue
            mean = total / count
            metrics[f"rewards/{label}"] = mean
            if weight == 0:
                metrics[f"judges/{label}"] = mean
                metrics[f"judges_std/{label}"] = math.sqrt(max(0.0, squares / count - mean * mean))
            if isinstance(reward, FunctionReward):
                metrics[f"rewards_applied/{label}"] = 1 - inapplicable / count
                if reward.on_error == "zero":
                    metrics[f"rewards_failed/{label}"] = failed / count
        return metrics

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
            token_ids=[ids.tolist() for ids in kept],
        )


def _new_tally(num_rewards: int) -> torch.Tensor:
    """Return what ``_tally_of`` counts for each reward, all 0."""
    return torch.zeros(num_rewards, 5, dtype=torch.float64)


def _tally_of(scores: Scores) -> torch.Tensor:
    """Return [5]: sum of scores and of their squares; all, inapplicable and failed answers."""
    values = scores.values.double().cpu()
    sums = [values.sum().item(), values.square().sum().item()]
    counts = [len(values), scores.num_inapplicable, scores.num_failed]
    return torch.tensor([*sums, *counts], dtype=torch.float64)


def metric_labels(names: list[str]) -> list[str]:
    """Return short distinct names for metrics: of a function, a grader or a model's folder."""
    labels: list[str] = []
    for name in names:
        short = name.partition("(")[0] if is_grader(name) else name.rpartition(":")[2]
        short = re.sub(r"[^\w.-]", "_", short.rstrip("/").rpartition("/")[2]) or "reward"
        label = short
        number = 2
        while label in labels:
            label = f"{short}_{number}"
            number += 1
        labels.append(label)
    return labels


def decode_answers(tokenizer, prompts: torch.Tensor, answers: list[torch.Tensor]) -> list[str]:
    """Return answers as text, without special tokens.

    Args:
        tokenizer: of the model that wrote them.
        prompts: their prompts [B, P], padded on the left.
        answers: B tensors of token ids.
    """
    # SentencePiece drops the space before the first word of a text. So an answer is decoded after
    # the end of its prompt, which is then removed.
    context = prompts[:, -CONTEXT_TOKENS:]
    joint = [torch.cat([ids, answer]) for ids, answer in zip(context, answers, strict=True)]
    context_texts = tokenizer.batch_decode(context, skip_special_tokens=True)
    joint_texts = tokenizer.batch_decode(joint, skip_special_tokens=True)
    texts = []
    for head, whole, answer in zip(context_texts, joint_texts, answers, strict=True):
        if whole.startswith(head):
            texts.append(whole[len(head) :])
        else:
            texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    return texts


def _error_text(error: BaseException) -> str:
    """Return an exception as its type and message; a worker's message has the type already."""
    return str(error) if isinstance(error, WorkerFailure) else f"{type(error).__name__}: {error}"


def _is_finite(score: object) -> bool:
    """Return whether a score is a number that fp32 can hold."""
    try:
        return isinstance(score, numbers.Real) and abs(float(score)) <= LARGEST_SCORE
    except OverflowError:  # an integer too large for a float
        return False


def _short_repr(score: object) -> str:
    """Return a score as text of at most 60 characters."""
    try:
        return f"{score!r:.60}"
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"a {type(score).__name__} of too many digits"


def function_digest(name: str, functions: Mapping[str, Callable] | None = None) -> str | None:
    """Return the sha256 of what a value of --reward_fn runs; None for a grader.

    Args:
        name: "file.py:function": its file counts; "object:NAME": its source counts.
        functions: by name.

    Returns:
        None also if the source of a function is not known.
    """
    if functions and name.startswith(OBJECT_PREFIX):
        return _source_digest(functions[name])
    if is_grader(name):
        return None
    return file_entry(user_path(name.rpartition(":")[0]))["sha256"]


def _source_digest(function: Callable) -> str | None:
    """Return the sha256 of the source of a function, or of an object's class; None if unknown."""
    function = getattr(function, "func", function)  # of a functools.partial
    code = function if inspect.isroutine(function) else type(function)
    try:
        return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()
    except (OSError, TypeError):  # made by exec, or written in C
        return None


def same_tokens(tokenizer, other) -> bool:
    """Return whether every token of `tokenizer` has the same id in `other`, which may have more."""
    known = other.get_vocab()
    return all(known.get(token) == index for token, index in tokenizer.get_vocab().items())


def reads_actor_tokens(tokenizer, other, *, prompt_format: str, reward_prompt_format: str) -> bool:
    """Return whether a reward model can read the token ids of the actor as they are.

    Token ids, end token, chat template and prompt format must be the same.

    Args:
        tokenizer: the actor's.
        other: the reward model's.
        prompt_format: the actor's.
        reward_prompt_format: the reward model's; "auto" is the actor's.
    """
    return (
        same_tokens(tokenizer, other)
        and other.eos_token_id == tokenizer.eos_token_id
        and other.chat_template == tokenizer.chat_template
        and reward_prompt_format in ("auto", prompt_format)
    )


def check_critic_tokenizer(tokenizer, critic_tokenizer, path: str) -> None:
    """Check that the critic knows the actor's token ids, which it reads.

    Raises:
        ValueError: it does not; names --critic_model_name_or_path.
    """
    if not same_tokens(tokenizer, critic_tokenizer):
        raise ValueError(
            f"--critic_model_name_or_path {path}: its tokenizer ({len(critic_tokenizer)} tokens) "
            f"is not the actor's ({len(tokenizer)} tokens), and in step 3 the critic reads the "
            "actor's tokens. Give this model as --reward_model_name_or_path, for which answers are "
            "tokenized again, and let the critic start from the actor or from a reward model with "
            "the actor's tokenizer."
        )
