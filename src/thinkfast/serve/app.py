"""The server's routes: OpenAI's three, health, figures and the page."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from thinkfast import __version__
from thinkfast.data.chat import render_messages
from thinkfast.engine.live import Request as Drawing
from thinkfast.engine.sampling import SamplingParams
from thinkfast.errors import BadInput
from thinkfast.scale.grade import Grader
from thinkfast.serve import shapes
from thinkfast.serve.ballot import default_strategy
from thinkfast.serve.draw import EngineClosed, Served, complete
from thinkfast.serve.gate import Bounds, Gate, answer
from thinkfast.serve.judge import Judge, JudgeFailed
from thinkfast.serve.keys import Keys
from thinkfast.serve.meter import Meter
from thinkfast.serve.stream import EventStream, unless_gone
from thinkfast.serve.vote import Plan, vote
from thinkfast.serve.wire import ChatRequest, CompletionRequest, Refused, refuse_body

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Asked = ChatRequest | CompletionRequest
CHARACTERS = 16
"""A prompt's text may have so many for each token it may have: what is longer is not cut into tokens first, since that
can take seconds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask, and how many may be open at once.

    prompt, answer: tokens. n: choices. samples: chains of one vote. budget: seconds, also where none is asked for.
    queue: open requests; one more is answered with 429.
    """

    prompt: int = 2048
    answer: int = 4096
    n: int = 64
    samples: int = 256
    budget: float = 60.0
    queue: int = 128
    bounds: Bounds = field(default_factory=Bounds)


class Desk:
    """Takes requests for the models it serves. `closing`: nothing new is taken, what runs is finished."""

    def __init__(self, models: Sequence[Served], limits: Limits, judge: Judge | None, log_prompts: bool) -> None:
        self.models = {served.name: served for served in models}
        self.limits, self.judge, self.log_prompts = limits, judge, log_prompts
        self.meter, self.grader = Meter(models), Grader(seconds=1.0)
        self.open: dict[object, float] = {}
        self.closing = False
        self.started = int(time.time())

    def hand_back(self, seconds: float) -> None:
        """Ends every request within `seconds` with what it has by then."""
        self.closing = True
        for served in self.models.values():
            served.live.hand_back(time.monotonic() + seconds)

    def serve(self, asked: Asked, request: Request, chat: bool) -> shapes.Job:
        """Checks a request against what is served and allowed. Raises Refused."""
        if self.closing:
            raise Refused(503, "the server is shutting down", code="shutting_down", retry=5)
        served = self.models.get(asked.model)
        if served is None:
            there = ", ".join(self.models)
            raise Refused(
                404, f"model: no model {asked.model!a} here, expected one of {there}", "model", "model_not_found"
            )
        if served.live.broken:
            raise Refused(503, f"model: the engine of {served.name} has stopped", "model", "engine_stopped", 30)
        arrived: float = request.state.arrived
        budget = self._budget(asked)
        prompt, problem = _prompt(served, asked, self._longest(served))
        params = self._params(served, asked, prompt)
        stream = asked.stream
        if asked.stream_options is not None and not stream:
            raise Refused(400, "stream_options: expected only together with stream", "stream_options")
        if asked.votes and asked.likeliest is not None:
            raise Refused(400, "logprobs: not with time_budget or strategy", "logprobs")
        most = self.limits.samples if asked.votes else self.limits.n
        n = asked.n or (most if asked.votes else 1)
        if n > most:
            raise Refused(400, f"n: expected at most {most}, not {n}", "n")
        if asked.min_samples > n:
            raise Refused(400, f"min_samples: expected at most n = {n}, not {asked.min_samples}", "min_samples")
        if len(self.open) >= self.limits.queue:
            wait = max(1, math.ceil(min(self.open.values()) - time.monotonic()))
            raise Refused(429, f"{self.limits.queue} requests are open already", code="queue_full", retry=wait)
        facts = request.state.facts
        facts |= {"model": served.name, "prompt_tokens": len(prompt), "stream": stream}
        strategy = asked.strategy or default_strategy(self.judge is not None)
        if asked.votes:
            facts |= {"budget": budget, "strategy": strategy}
        if self.log_prompts:
            facts["prompt"] = problem
        job = shapes.Job(served.name, chat, len(prompt), facts)
        if asked.votes:
            job.plan = Plan(
                problem,
                prompt,
                params,
                strategy,
                n,
                arrived,
                arrived + budget,
                asked.min_samples,
                asked.stops,
                self.judge,
                asked.return_samples,
            )
        else:
            watch = stream or bool(asked.stops) or asked.likeliest is not None
            job.request = Drawing(prompt, params, n, arrived + budget, watch, asked.likeliest or 0)
        return job

    def _budget(self, asked: Asked) -> float:
        most = self.limits.budget
        if asked.time_budget is not None and asked.time_budget > most:
            raise Refused(
                400, f"time_budget: expected at most {most:g} seconds, not {asked.time_budget:g}", "time_budget"
            )
        return asked.time_budget or most

    def _longest(self, served: Served) -> int:
        """Tokens of a prompt, at most."""
        return min(self.limits.prompt, served.live.capacity - 1)

    def _params(self, served: Served, asked: Asked, prompt: Sequence[int]) -> SamplingParams:
        field_, most = _prompt_field(asked), self._longest(served)
        room = min(self.limits.answer, served.live.capacity - len(prompt))
        if len(prompt) > most:
            raise Refused(
                400, f"{field_}: expected at most {most} tokens, not {len(prompt)}", field_, "context_length_exceeded"
            )
        if asked.limit is not None and asked.limit > room:
            told = f"max_tokens: expected at most {room} behind a prompt of {len(prompt)} tokens, not {asked.limit}"
            raise Refused(400, told, "max_tokens", "context_length_exceeded")
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        params = SamplingParams(asked.limit or max(room, 1), asked.temperature, asked.top_p, asked.top_k, seed=seed)
        try:
            served.live.engine.check([prompt], 1, params)
        except BadInput as error:
            raise Refused(400, f"{field_}: {error}", field_) from error
        return params


def _prompt_field(asked: Asked) -> str:
    return "messages" if isinstance(asked, ChatRequest) else "prompt"


def _prompt(served: Served, asked: Asked, tokens: int) -> tuple[tuple[int, ...], str]:
    """Token ids, and the text that a reward model is shown. Refuses text that is too long for so many tokens."""
    tokenizer = served.tokenizer
    field_, characters = _prompt_field(asked), asked.characters
    if characters > CHARACTERS * tokens:
        told = f"{field_}: expected at most {CHARACTERS * tokens} characters, not {characters}"
        raise Refused(400, told, field_, "context_length_exceeded")
    if isinstance(asked, ChatRequest):
        messages = [{"role": message.role, "content": message.text} for message in asked.messages]
        try:
            return tuple(render_messages(tokenizer, messages)), messages[-1]["content"]
        except BadInput as error:
            raise Refused(400, f"messages: {error}", "messages") from error
    if isinstance(asked.prompt, str):
        return tuple(tokenizer.encode(tokenizer.bos_token + asked.prompt)), asked.prompt
    return tuple(asked.prompt), tokenizer.decode([token for token in asked.prompt if 0 <= token < 2**31])


def create_app(
    models: Sequence[Served],
    limits: Limits | None = None,
    keys: Keys | None = None,
    judge: Judge | None = None,
    log_prompts: bool = False,
) -> FastAPI:
    """The application that serves these models; `app.state.desk` is its `Desk`.

    Raises BadInput for two models of one name.
    """
    names = [served.name for served in models]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise BadInput(f"model name {double!r} occurs twice, expected directories of different names")
    desk = Desk(models, limits or Limits(), judge, log_prompts)
    app = FastAPI(title="thinkfast", version=__version__, docs_url=None, redoc_url=None)
    app.state.desk = desk
    app.add_middleware(Gate, keys=keys, meter=desk.meter, bounds=desk.limits.bounds)
    _errors(app)
    _routes(app, desk)
    return app


def _routes(app: FastAPI, desk: Desk) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": shapes.Error} for status in ("400", "401", "404", "408", "413", "429", "503")
    }

    @app.post("/v1/chat/completions", responses=errors)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await _answer(desk, asked, request, chat=True)

    @app.post("/v1/completions", responses=errors)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(desk, asked, request, chat=False)

    @app.get("/v1/models", responses={401: errors["401"]})
    async def models() -> dict[str, Any]:
        rows = [
            {"id": name, "object": "model", "created": desk.started, "owned_by": "thinkfast"} for name in desk.models
        ]
        return {"object": "list", "data": rows}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": shapes.Error}})
    async def ready() -> dict[str, str]:
        broken = [name for name, served in desk.models.items() if served.live.broken]
        if desk.closing or broken:
            told = "the server is shutting down" if desk.closing else f"the engine of {broken[0]} has stopped"
            raise Refused(503, told, code="not_ready", retry=5)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={401: errors["401"]})
    async def metrics() -> Response:
        return Response(desk.meter.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, name, kind in (
        ("/", "page.html", "text/html; charset=utf-8"),
        ("/page.css", "page.css", "text/css; charset=utf-8"),
        ("/page.js", "page.js", "text/javascript; charset=utf-8"),
    ):
        app.add_api_route(path, _file(HERE / name, kind), response_class=Response, include_in_schema=False)


def _file(path: Path, kind: str) -> Any:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def give() -> Response:
        return FileResponse(path, media_type=kind, headers={**headers, "Cache-Control": "no-cache"})

    return give


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        fields = CompletionRequest.model_fields if request.url.path == "/v1/completions" else ChatRequest.model_fields
        return answer(refuse_body(error.errors(), list(fields)))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        response = answer(Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(Refused(500, "something went wrong in the server", code="internal_error"))

    @app.exception_handler(EngineClosed)
    @app.exception_handler(JudgeFailed)
    async def closed(request: Request, error: Exception) -> Response:
        return answer(_stopped(error))


def _stopped(error: Exception) -> Refused:
    if isinstance(error, JudgeFailed):
        return Refused(503, f"the reward model failed: {error}", "strategy", "reward_failed", retry=30)
    return Refused(503, f"the engine stopped: {error}", code="engine_stopped", retry=30)


async def _answer(desk: Desk, asked: Asked, request: Request, chat: bool) -> Response:
    job = desk.serve(asked, request, chat)
    served = desk.models[job.model]
    place = object()
    deadline = job.plan.deadline if job.plan is not None else job.request.deadline if job.request is not None else 0.0
    desk.open[place] = deadline

    async def events() -> AsyncGenerator[Any, None]:
        try:
            if job.plan is not None:
                drawn: AsyncGenerator[Any, None] = vote(served, job.plan, desk.grader)
            else:
                assert job.request is not None
                drawn = complete(served, job.request, asked.stops)
            async with aclosing(drawn) as source:
                async for event in source:
                    job.note(event)
                    yield event
        finally:
            desk.meter.samples.labels(served.name).inc(job.samples)
            desk.meter.ended.labels(served.name).inc(job.ended_tokens)
            del desk.open[place]

    async def told() -> None:
        """When the last byte is out."""
        now = time.monotonic()
        desk.meter.late.observe(max(0.0, now - deadline))
        desk.meter.votes.labels(job.facts["stopped"]).inc()
        served.tell.note(now - job.ended)

    usage = asked.stream_options is not None and asked.stream_options.include_usage
    writer = shapes.Writer(job, served.tokenizer, asked.likeliest, asked.return_samples, usage)
    after = None if job.plan is None else BackgroundTask(told)
    if asked.stream:
        return EventStream(_lines(writer, events()), after)
    document = await unless_gone(request, _collect(writer, events()))
    return Response(status_code=499) if document is None else JSONResponse(document, background=after)


async def _collect(writer: shapes.Writer, events: AsyncGenerator[Any, None]) -> dict[str, Any]:
    found = [event async for event in events]
    return writer.whole(found)


async def _lines(writer: shapes.Writer, events: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events) as source:
        try:
            async for event in source:
                for chunk in writer.chunks(event):
                    yield f"data: {json.dumps(chunk)}\n\n"
            for chunk in writer.last():
                yield f"data: {json.dumps(chunk)}\n\n"
        except (EngineClosed, JudgeFailed) as error:
            yield f"data: {json.dumps(_stopped(error).document())}\n\n"
    yield "data: [DONE]\n\n"
