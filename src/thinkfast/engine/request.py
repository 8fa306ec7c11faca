"""What is asked of the engine for many requests at once, and what it tells of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from thinkfast.engine.sampling import Sample, SamplingParams

COMPLETE, CANCELLED, CLOSED = "complete", "cancelled", "closed"


@dataclass(frozen=True, slots=True)
class Request:
    """Up to `n` samples of one prompt until `deadline` on `time.monotonic()`.

    watch: tell of tokens while samples run, about every 25 ms; such a sample never starts anew.
    alternatives: with `watch`, so many of the likeliest tokens beside every drawn one.
    whole: start no sample that would, as long as the shortest one before it, not end by the deadline.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    n: int
    deadline: float = math.inf
    watch: bool = False
    alternatives: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that sample `index` has drawn since its last piece, their log-probabilities, and the likeliest there."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """Sample `index` has ended; its times are seconds since the request was submitted."""

    index: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class Closed:
    """The last event. `reason` is "complete", "deadline", "cancelled", "closed" (the engine was) or what went wrong."""

    reason: str


Event = Piece | Drawn | Closed
Listener = Callable[[Event], None]
