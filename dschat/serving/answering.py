"""Answers to requests: one request at a time has the models, and its text streams as it is made."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dschat.serving.chat_model import Answer, Sampling
from dschat.serving.guard import RequestError

logger = logging.getLogger(__name__)

POLL_S = 0.1  # how often a waiting request looks whether its client is still there
SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True)
class Settings:
    """Settings of one answer's generation."""

    max_new_tokens: int
    sampling: Sampling
    ends: tuple[str, ...] = ()  # texts that end the answer


@dataclass(frozen=True)
class Question:
    """A conversation that one model answers."""

    model: str
    messages: list[dict]
    ids: list[int]
    left_out: int  # old messages that did not fit
    settings: Settings


class Answering:
    """Gives answers, to one request at a time.

    Args:
        chats: the models by name; each has ``answer`` and ``as_turn`` as ``Chat`` does.
        max_wait_s: how long a request waits for its turn.
        score: returns the reward of an answer to a conversation; None: no scores.
    """

    def __init__(
        self,
        chats: dict,
        *,
        max_wait_s: float,
        score: Callable[..., float | None] | None = None,
    ):
        self.chats = chats
        self.max_wait_s = max_wait_s
        self.score = score
        self.closing = threading.Event()
        self._turn = asyncio.Lock()
        # One thread: a program that exits while a thread is inside the model's C++ code is aborted.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="answers")

    async def begin(
        self, questions: list[Question], gone: Callable[[], Awaitable[bool]]
    ) -> "AnswerRun":
        """Wait for the turn and begin to answer.

        Args:
            questions: answered one after the other.
            gone: returns whether the client has left; its answers then stop.

        Raises:
            RequestError: the models stayed busy, the client left, or the server is shutting down.
        """
        await self._take_turn(gone)
        return AnswerRun(self, questions, gone)

    async def _take_turn(self, gone: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + self.max_wait_s
        waiting = asyncio.ensure_future(self._turn.acquire())
        try:
            while True:
                await asyncio.wait({waiting}, timeout=POLL_S)
                self._check_waiting(deadline, has_turn=waiting.done(), has_left=await gone())
                if waiting.done():
                    return
        except BaseException:
            if not waiting.cancel():  # it has the turn already
                self._turn.release()
            raise

    def _check_waiting(self, deadline: float, *, has_turn: bool, has_left: bool) -> None:
        if self.closing.is_set():
            raise RequestError(503, SHUTTING_DOWN)
        if has_left:
            raise RequestError(499, "the client has left")
        if not has_turn and time.monotonic() >= deadline:
            message = f"the model was busy for {self.max_wait_s:g} s (--max_wait_s)"
            raise RequestError(503, message, retry_after_s=max(1.0, self.max_wait_s))

    def close(self) -> None:
        """Stop the answer in progress, and wait for its thread."""
        self.closing.set()
        self._pool.shutdown(wait=True)


class AnswerRun:
    """The answers to one request, in progress. Iterate over ``events``, and call ``stop`` last."""

    def __init__(
        self, owner: Answering, questions: list[Question], gone: Callable[[], Awaitable[bool]]
    ):
        self._owner = owner
        self._gone = gone
        self._stop = threading.Event()
        self._events: asyncio.Queue[dict] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.questions = questions
        done = self._loop.run_in_executor(owner._pool, self._work, questions)
        done.add_done_callback(lambda _: owner._turn.release())

    def stop(self) -> None:
        """End the answer at its next token."""
        self._stop.set()

    async def events(self) -> AsyncIterator[dict]:
        """Yield the events in turn, and end early if the client leaves.

        Each event has a field "event":

        - "begin" and "text" (a piece of the answer) with the "index" of the question,
        - "end" with index, the whole "text", "num_tokens", "ended" (False: cut), "left_out",
          "seconds", and "score" if there is a reward model,
        - "error" with "error" and "status", which is the last one.
        """
        looked = time.monotonic()
        while True:
            event = None
            try:
                event = await asyncio.wait_for(self._events.get(), POLL_S)
            except asyncio.TimeoutError:
                looked = 0.0
            if time.monotonic() - looked >= POLL_S:
                looked = time.monotonic()
                if await self._gone():
                    self.stop()
                    return
            if event is None:
                continue
            if event["event"] == "done":
                return
            yield event

    def _put(self, event: str, **values) -> None:
        """Hand an event from the models' thread to the request."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, {"event": event, **values})

    def _is_stopped(self) -> bool:
        return self._stop.is_set() or self._owner.closing.is_set()

    def _work(self, questions: list[Question]) -> None:
        try:
            for index, question in enumerate(questions):
                if self._is_stopped():
                    break
                self._answer(index, question)
        except Exception:
            logger.exception("the model failed to answer a request")
            self._put("error", status=500, error="the model failed; see the server's log")
        if self._owner.closing.is_set():
            self._put("error", status=503, error=SHUTTING_DOWN)
        self._put("done")

    def _answer(self, index: int, question: Question) -> None:
        chat = self._owner.chats[question.model]
        settings = question.settings
        self._put("begin", index=index)
        started = time.monotonic()
        answer: Answer = chat.answer(
            question.ids,
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            ends=settings.ends,
            show=lambda piece: self._put("text", index=index, text=piece),
            stop=self._is_stopped,
        )
        text = chat.as_turn(answer.text)
        values = dict(text=text, num_tokens=answer.num_tokens, ended=answer.ended)
        values |= dict(left_out=question.left_out, seconds=time.monotonic() - started)
        if self._owner.score and not self._is_stopped():
            values["score"] = self._owner.score(question.messages, text, ended=answer.ended)
        self._put("end", index=index, **values)
