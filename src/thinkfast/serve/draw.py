"""From a request to its events: chains and their vote by a deadline, or plain completions. For asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkfast.data.tokenizer import Tokenizer, load_tokenizer
from thinkfast.engine.engine import Engine
from thinkfast.engine.live import CLOSED, COMPLETE, Closed, Drawn, Event, LiveEngine, Piece, Request
from thinkfast.engine.sampling import DEADLINE, ERROR, STOP, SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, read_config
from thinkfast.scale.grade import Grader
from thinkfast.serve.ballot import Ballot, Chain, Outcome, find_equal, parse_chain
from thinkfast.serve.text import TextStream, cut_at_stop

Scorer = Callable[[str, Sequence[str]], Sequence[float]]
"""A reward model: a problem and completions of it to a score each. Called in a thread."""

RESERVE, RESERVED_SHARE = 0.05, 0.1
LATE = 0.4  # of the reserve, after which an engine that has not come back is not waited for


@dataclass(frozen=True, slots=True)
class Served:
    """A model that answers: its name, tokenizer and engine."""

    name: str
    tokenizer: Tokenizer
    live: LiveEngine


@dataclass(frozen=True, slots=True)
class Plan:
    """How to spend a budget. started, deadline: `time.monotonic()`. n: chains at most. scorer: a reward model."""

    problem: str
    prompt: tuple[int, ...]
    params: SamplingParams
    strategy: str
    n: int
    started: float
    deadline: float
    min_samples: int = 1
    stops: tuple[str, ...] = ()
    scorer: Scorer | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of choice `index`, with the tokens behind it; at its end `reason`, and how many tokens there were."""

    index: int
    text: str
    piece: Piece | None = None
    reason: str | None = None
    tokens: int = 0


def open_model(directory: Path, slots: int, capacity: int, name: str | None = None) -> Served:
    """Loads a model directory and starts its engine. Raises BadInput for a directory that is no model."""
    read_config(directory)
    tokenizer = load_tokenizer(directory)
    engine = Engine(load_model(directory), slots)
    return Served(name or directory.resolve().name, tokenizer, LiveEngine(engine, capacity))


def submit(served: Served, request: Request) -> tuple[Callable[[], None], asyncio.Queue[Event], Callable[[int], None]]:
    """Hands a request to the engine's thread; returns how to cancel it, its events, and how to end one sample."""
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Event] = asyncio.Queue()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    try:
        ticket = served.live.submit(request, tell)
    except RuntimeError as error:
        raise EngineClosed(str(error)) from error
    return ticket.cancel, inbox, ticket.end


class EngineClosed(Exception):
    """The engine takes no more requests, or broke while it served this one."""


async def vote(served: Served, plan: Plan, grader: Grader) -> AsyncGenerator[Chain | Outcome, None]:
    """Yields chains as they end and, by the deadline, the outcome. Closing the iterator gives the slots back.

    A little of the budget, 10 % and at most 50 ms, is kept back for the last answers and for what the caller does.
    """
    reserve = min(RESERVE, RESERVED_SHARE * (plan.deadline - plan.started))
    until = plan.deadline - reserve
    request = Request(plan.prompt, plan.params, plan.n, until, whole=True)
    cancel, inbox, _ = submit(served, request)
    ballot, stopped = Ballot(plan.strategy, plan.n, plan.min_samples), DEADLINE
    news = asyncio.Event()
    side = asyncio.create_task(_settle(ballot, grader, news))
    try:
        with contextlib.suppress(TimeoutError):
            while True:
                async with _until(until + LATE * reserve):
                    event = await inbox.get()
                if isinstance(event, Closed):
                    stopped = "samples" if event.reason == COMPLETE else event.reason
                    break
                if isinstance(event, Drawn):
                    async with _until(until + LATE * reserve):
                        chain = await _chain(served, event, plan)
                    ballot.add(chain)
                    if ballot.unplaced:
                        news.set()
                    yield chain
                    if ballot.decided():
                        stopped = "decided"
                        break
        with contextlib.suppress(TimeoutError):
            async with _until(until + LATE * reserve):
                while ballot.unplaced and plan.strategy != "best_of_n":
                    await asyncio.sleep(0.002)
        if stopped not in (DEADLINE, "samples", "decided", CLOSED):
            raise EngineClosed(stopped)
        yield ballot.outcome(time.monotonic() - plan.started, stopped)
    finally:
        cancel()
        side.cancel()


async def complete(served: Served, request: Request, stops: Sequence[str]) -> AsyncGenerator[Delta, None]:
    """Yields what `n` choices say as they say it; each ends with a delta that has a reason, "stop" or "length"."""
    cancel, inbox, end = submit(served, request)
    streams = {index: TextStream(served.tokenizer, stops) for index in range(request.n)}
    try:
        while streams:
            event = await inbox.get()
            if isinstance(event, Closed):
                if event.reason not in (COMPLETE, DEADLINE, CLOSED):
                    raise EngineClosed(event.reason)
                for index, stream in streams.items():
                    yield Delta(index, stream.end(), None, "length", stream.tokens)
                return
            if event.index not in streams:
                continue
            stream = streams[event.index]
            if isinstance(event, Piece):
                yield Delta(event.index, stream.push(event.token_ids), event)
                if stream.stopped:
                    end(event.index)
                    del streams[event.index]
                    yield Delta(event.index, "", None, "stop", stream.tokens)
                continue
            del streams[event.index]
            sample = event.sample
            if sample.finish_reason == ERROR:
                raise EngineClosed("the model's logits were not finite")
            rest = stream.end() if request.watch else served.tokenizer.decode(list(sample.token_ids))
            stopped = sample.finish_reason == STOP or stream.stopped
            yield Delta(event.index, rest, None, "stop" if stopped else "length", len(sample.token_ids))
    finally:
        cancel()


async def _chain(served: Served, event: Drawn, plan: Plan) -> Chain:
    sample = event.sample
    text, stopped = cut_at_stop(served.tokenizer.decode(list(sample.token_ids)), plan.stops)
    reason = "stop" if stopped else sample.finish_reason
    seconds = time.monotonic() - plan.started
    chain = parse_chain(event.index, text, len(sample.token_ids), seconds, reason, sample.logprob_sum)
    if plan.scorer is None or chain.answer is None:
        return chain
    (score,) = await asyncio.to_thread(plan.scorer, plan.problem, [text])
    return Chain(event.index, text, chain.answer, chain.tokens, seconds, reason, score)


async def _settle(ballot: Ballot, grader: Grader, news: asyncio.Event) -> None:
    """Finds the classes of answers that are no plain numbers, one after the other, beside everything else."""
    while await news.wait():
        news.clear()
        while ballot.unplaced:
            answer = ballot.unplaced[0]
            equal = await asyncio.to_thread(find_equal, grader, list(ballot.representatives), answer)
            ballot.place(answer, equal)


def _until(moment: float) -> asyncio.Timeout:
    """A timeout at a moment of `time.monotonic()`."""
    loop = asyncio.get_running_loop()
    return asyncio.timeout_at(loop.time() + moment - time.monotonic())


def seconds_of(text: str) -> float:
    """Seconds of a duration like "5s", "500ms", "2m" or "1.5". Raises BadInput."""
    for unit, scale in (("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("", 1.0)):
        if text.endswith(unit):
            with contextlib.suppress(ValueError):
                value = float(text.removesuffix(unit)) * scale
                if 0 < value < 86400:
                    return value
            break
    raise BadInput(f"budget is {text!r}, expected a duration like 5s, 500ms or 2m")
