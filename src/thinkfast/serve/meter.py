"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from thinkfast.engine.live import LiveEngine
from thinkfast.serve.draw import Served

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60)


class Meter:
    """The figures of one server, in a registry of its own."""

    def __init__(self, models: Sequence[Served]) -> None:
        self._registry = at = CollectorRegistry()
        here = "thinkfast"
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], here, registry=at)
        told = "Seconds from a request to the end of its answer."
        self.seconds = Histogram("request_seconds", told, ["path"], here, registry=at, buckets=SECONDS)
        told = "Seconds by which an answer missed its deadline, 0 where it did not."
        self.late = Histogram("late_seconds", told, (), here, registry=at, buckets=SECONDS)
        self.samples = Counter("samples", "Chains of thought and completions that ended.", ["model"], here, registry=at)
        told = "Tokens of chains of thought and completions that came to their end."
        self.ended = Counter("ended_tokens", told, ["model"], here, registry=at)
        self.votes = Counter("votes", "Votes by what ended them.", ["stopped"], here, registry=at)
        for name, told, value in (
            ("decoded_tokens", "Tokens decoded.", _tokens),
            ("dropped_tokens", "Tokens of samples that started anew.", _dropped),
            ("running_samples", "Samples being decoded.", _running),
            ("open_requests", "Requests that share the engine.", _requests),
        ):
            gauge = Gauge(name, told, ["model"], here, registry=at)
            for served in models:
                gauge.labels(served.name).set_function(partial(value, served.live))

    def page(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self._registry)


def _tokens(live: LiveEngine) -> int:
    return live.tokens


def _dropped(live: LiveEngine) -> int:
    return live.dropped


def _running(live: LiveEngine) -> int:
    return live.running


def _requests(live: LiveEngine) -> int:
    return live.requests
