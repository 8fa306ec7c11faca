"""Models that answer, and plain completions of theirs as events for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkfast.data.tokenizer import Tokenizer, load_tokenizer
from thinkfast.engine.engine import Engine
from thinkfast.engine.live import CLOSED, COMPLETE, Closed, Event, LiveEngine, Piece, Request, Ticket
from thinkfast.engine.sampling import DEADLINE, ERROR, STOP
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, read_config
from thinkfast.serve.text import TextStream

FADE = 0.98  # of the longest: half of it is forgotten after 34 measurements


class Spread:
    """How long something takes at the worst: its running mean and four mean deviations (RFC 6298), or the longest it
    has lately taken, since pauses of a machine come seldom and then several at a time."""

    def __init__(self, guess: float) -> None:
        self._mean, self._deviation, self._longest = guess, guess / 2, 0.0

    @property
    def seconds(self) -> float:
        return max(self._mean + 4 * self._deviation, self._longest)

    def note(self, seconds: float) -> None:
        """Takes a measurement in."""
        self._longest = max(seconds, FADE * self._longest)
        self._deviation += (abs(seconds - self._mean) - self._deviation) / 4
        self._mean += (seconds - self._mean) / 8


@dataclass(frozen=True, slots=True)
class Served:
    """A model that answers: its name, tokenizer and engine.

    hand: how long after a deadline the engine hands over what it has. tell: how long from an outcome to its last byte.
    """

    name: str
    tokenizer: Tokenizer
    live: LiveEngine
    hand: Spread = field(default_factory=lambda: Spread(0.005))
    tell: Spread = field(default_factory=lambda: Spread(0.002))


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


def submit(served: Served, request: Request, inbox: asyncio.Queue[Any]) -> Ticket:
    """Hands a request to the engine's thread, which puts its events into the inbox. Raises EngineClosed."""
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(inbox.put_nowait, event)

    try:
        return served.live.submit(request, tell)
    except RuntimeError as error:
        raise EngineClosed(str(error)) from error


class EngineClosed(Exception):
    """The engine takes no more requests, or broke while it served this one."""


async def complete(served: Served, request: Request, stops: Sequence[str]) -> AsyncGenerator[Delta, None]:
    """Yields what `n` choices say as they say it; each ends with a delta that has a reason, "stop" or "length"."""
    inbox: asyncio.Queue[Event] = asyncio.Queue()
    ticket = submit(served, request, inbox)
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
            stream = streams[event.index]
            if isinstance(event, Piece):
                if not stream.stopped:
                    yield Delta(event.index, stream.push(event.token_ids), event)
                    if stream.stopped:
                        ticket.end(event.index)
                continue
            del streams[event.index]
            sample = event.sample
            if sample.finish_reason == ERROR:
                raise EngineClosed("the model's logits were not finite")
            rest = stream.end() if request.watch else served.tokenizer.decode(list(sample.token_ids))
            stopped = sample.finish_reason == STOP or stream.stopped
            yield Delta(event.index, rest, None, "stop" if stopped else "length", len(sample.token_ids))
    finally:
        ticket.cancel()


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
