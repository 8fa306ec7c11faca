"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from thinkfast.serve.draw import Served

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60)


class Meter:
    """The figures of one server, in a registry of its own."""

    def __init__(self, models: Sequence[Served]) -> None:
        self._registry = CollectorRegistry()
        mine = {"namespace": "thinkfast", "registry": self._registry}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **mine)
        self.seconds = Histogram(
            "request_seconds", "Seconds from a request to the end of its answer.", ["path"], buckets=SECONDS, **mine
        )
        self.late = Histogram(
            "late_seconds", "Seconds by which an answer missed its deadline; 0 if it did not.", buckets=SECONDS, **mine
        )
        self.samples = Counter("samples", "Chains of thought that ended.", ["model"], **mine)
        self.stopped = Counter("votes", "Votes by what ended them.", ["stopped"], **mine)
        tokens = Gauge("tokens_total", "Tokens decoded.", ["model"], **mine)
        dropped = Gauge("dropped_tokens_total", "Tokens of samples that started anew.", ["model"], **mine)
        running = Gauge("running_samples", "Samples being decoded.", ["model"], **mine)
        requests = Gauge("open_requests", "Requests that share the engine.", ["model"], **mine)
        for served in models:
            live = served.live
            tokens.labels(served.name).set_function(lambda live=live: live.tokens)
            dropped.labels(served.name).set_function(lambda live=live: live.dropped)
            running.labels(served.name).set_function(lambda live=live: live.running)
            requests.labels(served.name).set_function(lambda live=live: live.requests)

    def page(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self._registry)
