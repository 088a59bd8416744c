"""The chat server's application: the page, its requests, and OpenAI's protocol."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.responses import Response

from dschat.serving import requests
from dschat.serving.answering import Answering, AnswerRun, Question
from dschat.serving.guard import (
    Guard,
    Limits,
    RequestError,
    content_policy,
    error_response,
    parse_json,
)
from dschat.serving.votes import Vote, VoteFiles

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Address:
    """The address of the server."""

    host: str
    public_url: str | None = None


def make_app(
    chats: dict,
    bounds: requests.Bounds,
    *,
    address: Address,
    limits: Limits,
    score: Callable[..., float | None] | None = None,
    votes: VoteFiles | None = None,
    page: str | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        chats: the models by name, as ``load_chats`` returns them.
        bounds: what requests may ask for.
        address: the names by which requests reach it.
        limits: limits on what requests may cost.
        score: returns the reward of an answer; None: no scores.
        votes: receives votes; None: the page offers none.
        page: the HTML of GET /; default: the package's page.
    """
    page = PAGE.read_text(encoding="utf-8") if page is None else page
    answering = Answering(chats, max_wait_s=limits.max_wait_s, score=score)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(answering.close)
        if votes:
            votes.close()

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.answering = answering
    app.add_middleware(
        Guard,
        host=address.host,
        public_url=address.public_url,
        limits=limits,
        policy=content_policy(page),
    )
    handlers = Handlers(chats, bounds, answering=answering, votes=votes)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return error_response(error, request.url.path)

    @app.exception_handler(ValueError)
    async def refuse_invalid(request: Request, error: ValueError) -> Response:
        return error_response(RequestError(400, str(error)), request.url.path)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def refuse_path(request: Request, error: Exception) -> Response:
        message = "not found: this server answers GET / and /v1/models, and POST /chat, /stream, "
        message += "/vote and /v1/chat/completions"
        return error_response(RequestError(404, message), request.url.path)

    app.add_api_route("/", lambda: HTMLResponse(page), methods=["GET"])
    app.add_api_route("/settings", handlers.settings, methods=["GET"])
    app.add_api_route("/chat", handlers.chat, methods=["POST"])
    app.add_api_route("/stream", handlers.stream, methods=["POST"])
    app.add_api_route("/vote", handlers.vote, methods=["POST"])
    app.add_api_route("/v1/models", handlers.models, methods=["GET"])
    app.add_api_route("/v1/chat/completions", handlers.chat_completions, methods=["POST"])
    return app


class Handlers:
    """The answers to each kind of request."""

    def __init__(
        self,
        chats: dict,
        bounds: requests.Bounds,
        *,
        answering: Answering,
        votes: VoteFiles | None,
    ):
        self.chats = chats
        self.bounds = bounds
        self.answering = answering
        self.votes = votes
        self.started = int(time.time())

    async def settings(self) -> dict:
        """Answer GET /settings: what the page needs to know."""
        settings = self.bounds.settings
        sampling = asdict(settings.sampling)
        sampling.pop("seed")
        return {
            "models": [
                {"name": name, "path": chat.path, "format": chat.format}
                for name, chat in self.chats.items()
            ],
            "max_new_tokens": settings.max_new_tokens,
            "max_turns": self.bounds.max_turns,
            "sampling": sampling,
            "votes": self.votes is not None,
        }

    async def chat(self, request: Request) -> dict:
        """Answer POST /chat: one answer, as JSON."""
        run = await self._begin(request, requests.read_request, most_models=1)
        end = await _last_answer(run)
        names = ("text", "num_tokens", "ended", "left_out")
        return {name: end[name] for name in (*names, *(["score"] if "score" in end else []))}

    async def stream(self, request: Request) -> Response:
        """Answer POST /stream: the events of ``AnswerRun``, as server-sent events."""
        run = await self._begin(request, requests.read_request)
        return EventStream(run, _events_of_page)

    async def vote(self, request: Request) -> dict:
        """Answer POST /vote."""
        if self.votes is None:
            raise RequestError(404, "this server takes no votes; start it with --votes FOLDER")
        fields = parse_json(await request.body())
        vote = requests.read_vote(fields, self.bounds)
        answers = tuple(
            replace(answer, path=self.chats[answer.model].path) for answer in vote.answers
        )
        formats = {self.chats[answer.model].format for answer in answers}
        prompt = vote.prompt
        if formats == {"plain"}:
            messages = requests.read_messages(fields, self.bounds)
            prompt = "".join(message["content"] for message in messages)
        try:
            pairs = await asyncio.to_thread(self.votes.add, Vote(prompt, answers, vote.best))
        except OSError as error:
            raise RequestError(507, f"the vote could not be written: {error.strerror}") from error
        return {"pairs": pairs}

    async def models(self) -> dict:
        """Answer GET /v1/models."""
        shared = {"object": "model", "created": self.started, "owned_by": "dschat"}
        return {"object": "list", "data": [{"id": name, **shared} for name in self.chats]}

    async def chat_completions(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions, in OpenAI's form."""
        fields = parse_json(await request.body())
        run = await self._begin(request, requests.read_chat_completion)
        question = run.questions[0]
        shared = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": question.model,
        }
        if fields.get("stream"):
            options = fields.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            chunks = _Chunks(shared, num_prompt=len(question.ids), with_usage=with_usage)
            return EventStream(run, chunks.of_events)
        end = await _last_answer(run)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": end["text"]},
            "finish_reason": _finish_reason(end),
            "logprobs": None,
        }
        usage = _usage(len(question.ids), end)
        return JSONResponse(
            {**shared, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    async def _begin(
        self, request: Request, read: Callable, *, most_models: int | None = None
    ) -> AnswerRun:
        """Read a request and begin its answers when its turn has come."""
        asked = read(parse_json(await request.body()), self.bounds)
        if most_models and len(asked.models) > most_models:
            raise ValueError(f"models: give at most {most_models}, or use /stream")
        questions = []
        for name in asked.models:
            ids, left_out = await asyncio.to_thread(self.chats[name].fit, asked.messages)
            questions.append(Question(name, asked.messages, ids, left_out, asked.settings))
        return await self.answering.begin(questions, request.is_disconnected)


class EventStream(Response):
    """Answers in progress as server-sent events; they stop if the client leaves.

    Args:
        run: the answers.
        shape: turns the events of ``AnswerRun`` into the texts that are sent.
    """

    media_type = "text/event-stream"

    def __init__(self, run: AnswerRun, shape: Callable[[AsyncIterator[dict]], AsyncIterator[str]]):
        super().__init__()
        self.run = run
        self.shape = shape

    async def __call__(self, scope, receive, send) -> None:
        """Send the events."""
        kind = b"text/event-stream; charset=utf-8"
        # Proxies such as nginx would otherwise hold the stream back.
        headers = [(b"content-type", kind), (b"x-accel-buffering", b"no")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for text in self.shape(self.run.events()):
                data = f"data: {text}\n\n".encode()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.run.stop()


async def _events_of_page(events: AsyncIterator[dict]) -> AsyncIterator[str]:
    async for event in events:
        yield json.dumps(event)
    yield json.dumps({"event": "done"})


class _Chunks:
    """The chunks of a streamed chat completion in OpenAI's form."""

    def __init__(self, shared: dict, *, num_prompt: int, with_usage: bool):
        self.shared = {**shared, "object": "chat.completion.chunk"}
        self.num_prompt = num_prompt
        self.with_usage = with_usage

    async def of_events(self, events: AsyncIterator[dict]) -> AsyncIterator[str]:
        yield self._chunk({"role": "assistant", "content": ""})
        async for event in events:
            if event["event"] == "text":
                yield self._chunk({"content": event["text"]})
            elif event["event"] == "end":
                yield self._chunk({}, finish_reason=_finish_reason(event))
                if self.with_usage:
                    usage = _usage(self.num_prompt, event)
                    yield json.dumps({**self.shared, "choices": [], "usage": usage})
            elif event["event"] == "error":
                error = {"message": event["error"], "type": "server_error"}
                yield json.dumps({"error": {**error, "param": None, "code": None}})
        yield "[DONE]"

    def _chunk(self, delta: dict, *, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return json.dumps({**self.shared, "choices": [choice]})


async def _last_answer(run: AnswerRun) -> dict:
    """Return the "end" event of a request with one question.

    Raises:
        RequestError: the model failed, the client left, or the server is shutting down.
    """
    found = None
    try:
        async for event in run.events():
            if event["event"] == "error":
                raise RequestError(event["status"], event["error"])
            if event["event"] == "end":
                found = event
    finally:
        run.stop()
    if found is None:
        raise RequestError(499, "the client has left")
    return found


def _finish_reason(end: dict) -> str:
    return "stop" if end["ended"] else "length"


def _usage(num_prompt: int, end: dict) -> dict:
    num_tokens = end["num_tokens"]
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }
