"""Graders that ask a server: a scoring server, or a language model that judges."""

import math
import numbers
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dschat.rewards.http_client import JsonClient, ServerError
from dschat.rewards.numbers import last_number
from dschat.rewards.references import references

Scores = list[float | None]
JUDGE_PROMPT = (
    "Rate the response to the request between the lines. Consider how helpful, correct and clear "
    "it is. Think in one or two sentences, then end with the rating, a number from 0 (worst) to "
    "{largest} (best).\n\n--- request ---\n{prompt}\n--- response ---\n{answer}\n---"
)


class ScoringServer:
    """The scores of a server, such as scripts/serve_reward.py.

    The request is {"prompts": [...], "answers": [...], "ended": [...]}, and the reply
    {"scores": [...]}, one number, or null (does not apply), for each answer. A prompt is a text or
    a list of messages, as in the data.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 64,
        parallel: int = 4,
        timeout_s: float = 60.0,
        retries: int = 3,
        key_env: str = "",
    ):
        """Set the server.

        Args:
            url: the address that takes the request.
            batch_size: most answers in a request.
            parallel: most requests at a time.
            timeout_s: see ``JsonClient``.
            retries: see ``JsonClient``.
            key_env: see ``JsonClient``.
        """
        _check_sizes(batch_size=batch_size, parallel=parallel)
        self.batch_size = batch_size
        self.parallel = parallel
        self._client = JsonClient(url, timeout_s=timeout_s, retries=retries, key_env=key_env)

    def __call__(
        self,
        prompts: list[str],
        answers: list[str],
        *,
        conversations: list,
        ended: list[bool],
        **columns,
    ) -> Scores:
        """Return one score per answer.

        Raises:
            ServerError: the server gives no usable scores.
        """
        starts = range(0, len(answers), self.batch_size)

        def score(start: int) -> Scores:
            part = slice(start, start + self.batch_size)
            request = {
                "prompts": conversations[part],
                "answers": answers[part],
                "ended": ended[part],
            }
            return self._read(self._client.post(request), len(answers[part]))

        return [score for part in _in_parallel(score, starts, self.parallel) for score in part]

    def _read(self, reply: Any, count: int) -> Scores:
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            raise ServerError(f"{self._client.url} did not give {count} scores: {reply!r:.200}")
        for score in scores:
            if score is not None and not isinstance(score, numbers.Real):
                raise ServerError(f"{self._client.url} gave the score {score!r:.200}")
        return scores


class LanguageModelJudge:
    """The rating of a language model at an OpenAI-compatible address, divided by the largest.

    The rating is the last number of its reply. NaN, a failure, if there is none from 0 to the
    largest.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str = JUDGE_PROMPT,
        largest: float = 10,
        column: str = "",
        max_tokens: int = 256,
        parallel: int = 8,
        timeout_s: float = 60.0,
        retries: int = 3,
        key_env: str = "",
    ):
        """Set the judge.

        Args:
            url: the address of the API, such as "http://localhost:8000/v1".
            model: the name of the model there.
            prompt: the request to the judge, with {prompt}, {answer}, {largest} and {reference}.
            largest: the best rating.
            column: the column of {reference}; see ``references``.
            max_tokens: most tokens of a reply.
            parallel: most requests at a time.
            timeout_s: see ``JsonClient``.
            retries: see ``JsonClient``.
            key_env: see ``JsonClient``.
        """
        _check_sizes(parallel=parallel, max_tokens=max_tokens, largest=largest)
        if "{answer}" not in prompt:
            raise ValueError("prompt has no {answer}; the judge would not see it")
        self.model = model
        self.prompt = prompt
        self.largest = largest
        self.column = column
        self.max_tokens = max_tokens
        self.parallel = parallel
        address = url.rstrip("/") + "/chat/completions"
        self._client = JsonClient(address, timeout_s=timeout_s, retries=retries, key_env=key_env)

    def __call__(self, prompts: list[str], answers: list[str], **columns) -> Scores:
        """Return one score from 0 to 1 per answer.

        Raises:
            ServerError: the server gives no usable reply.
        """
        wanted: list = [None] * len(answers)
        if "{reference}" in self.prompt:
            wanted = references(columns, self.column)
        rows = list(zip(prompts, answers, wanted, strict=True))
        return _in_parallel(lambda row: self._score(*row), rows, self.parallel)

    def _score(self, prompt: str, answer: str, reference: object) -> float:
        values = {
            "prompt": prompt,
            "answer": answer,
            "reference": str(reference),
            "largest": f"{self.largest:g}",
        }
        # In one pass, so that braces inside these texts stay as they are.
        text = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.prompt)
        reply = self._client.post(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": text}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            }
        )
        try:
            rating = last_number(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self._client.url} gave no message: {reply!r:.200}") from error
        if rating is None or not 0 <= rating.value <= self.largest:
            return math.nan
        return float(rating.value) / self.largest


def _check_sizes(**sizes: float) -> None:
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


def _in_parallel(function: Callable, items: Any, count: int) -> list:
    """Return function(item) for each item, `count` at a time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, items))
