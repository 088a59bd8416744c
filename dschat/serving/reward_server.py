"""A server of a reward model's scores, which the grader scoring_server reads.

POST /score takes {"prompts": [...], "answers": [...], "ended": [...]} and gives {"scores": [...]}.
A prompt is a text or a list of messages. It is rendered as in the training of the reward model, and
an answer gets the end token only if it has ended.
"""

import hmac
import threading
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from dschat.algorithms.masks import pool_last
from dschat.data.encoding import Encoder
from dschat.data.messages import normalize_messages, validate_messages
from dschat.data.row import Row

LARGEST_REQUEST = 2**25  # bytes
MOST_ANSWERS = 4096  # in a request


class ScoreRequest(BaseModel):
    """Prompts with answers."""

    prompts: list[str | list[dict]] = Field(max_length=MOST_ANSWERS)
    answers: list[str] = Field(max_length=MOST_ANSWERS)
    ended: list[bool] | None = None  # whether each answer ended by itself; None: all did


class ScoreReply(BaseModel):
    """One score for each answer."""

    scores: list[float]


class Scorer:
    """Scores of a reward model, one request at a time."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        *,
        prompt_format: str,
        batch_size: int,
        max_tokens: int | None = None,
    ):
        """Set the model.

        Args:
            model: a ``RewardModel``, in evaluation mode.
            tokenizer: the model's.
            prompt_format: how prompts are rendered.
            batch_size: most answers in a forward pass.
            max_tokens: longer texts are cut at the start, since the score is read at the end;
                None: no limit.
        """
        self.model = model
        self.encoder = Encoder(tokenizer, prompt_format=prompt_format)
        self.pad_id = tokenizer.pad_token_id
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self._lock = threading.Lock()

    def __call__(self, request: ScoreRequest) -> list[float]:
        """Return one score per answer.

        Raises:
            ValueError: the lists differ in length, or a prompt cannot be rendered.
        """
        ended = request.ended
        if ended is None:
            ended = [True] * len(request.answers)
        if not len(request.prompts) == len(request.answers) == len(ended):
            raise ValueError(
                f"{len(request.prompts)} prompts, {len(request.answers)} answers and {len(ended)} "
                "values of ended: give as many of each"
            )
        rows = zip(request.prompts, request.answers, ended, strict=True)
        ids = [self._ids(*row, number) for number, row in enumerate(rows)]
        # Texts of like length share a batch.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = [0.0] * len(ids)
        with self._lock:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                for i, score in zip(chosen, self._forward([ids[i] for i in chosen]), strict=True):
                    scores[i] = score
        return scores

    def _ids(self, prompt: str | list[dict], answer: str, ended: bool, number: int) -> list[int]:
        name = f"prompts[{number}]"
        if not isinstance(prompt, str):
            prompt = validate_messages(normalize_messages(prompt, name), name)
        ids = self.encoder.encode_answer(Row(prompt, place=name), answer or " ", ended=ended)
        return ids[-self.max_tokens :] if self.max_tokens else ids

    @torch.no_grad()
    def _forward(self, ids: Sequence[list[int]]) -> list[float]:
        longest = max(map(len, ids))
        device = next(self.model.parameters()).device
        mask = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device
        )
        tokens = torch.tensor(
            [row + [self.pad_id] * (longest - len(row)) for row in ids], device=device
        )
        values = self.model(input_ids=tokens, attention_mask=mask)
        return pool_last(values, mask).float().tolist()


def make_app(scorer: Scorer, *, token: str = "") -> FastAPI:
    """Return the application.

    Args:
        scorer: gives the scores.
        token: requests must send it as their bearer token; "": none is needed.
    """
    app = FastAPI(title="dschat reward model", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def check(request: Request, call_next) -> Any:
        if token and not _has_token(request, token):
            return _error(401, "the bearer token is missing or wrong")
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not length.isdecimal():
            return _error(411, "the request has no Content-Length")
        if length.isdecimal() and int(length) > LARGEST_REQUEST:
            return _error(413, f"the request has more than {LARGEST_REQUEST} bytes; send parts")
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return _error(422, f"{place}: {first['msg']}")

    @app.post("/score")
    def score(request: ScoreRequest) -> ScoreReply:  # not async: runs in a thread
        return ScoreReply(scores=scorer(request))

    @app.exception_handler(ValueError)
    async def explain(request: Request, error: ValueError) -> JSONResponse:
        return _error(400, str(error))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ready"}

    return app


def _has_token(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
