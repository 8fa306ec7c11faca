"""The engine for many requests at once, against `Engine.sample` and under pressure."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from thinkfast.engine.engine import Engine
from thinkfast.engine.live import LiveEngine, Ticket
from thinkfast.engine.request import Closed, Drawn, Event, Piece, Request
from thinkfast.engine.sampling import SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder

LONG = SamplingParams(max_tokens=200, temperature=1.3, seed=3, ignore_eos=True)
Open = Callable[..., LiveEngine]


@pytest.fixture
def open_engine(make_model: Callable[..., Decoder]) -> Iterator[Open]:
    opened: list[LiveEngine] = []

    def make(name: str = "hybrid", slots: int = 4, backend: str = "auto", capacity: int = 256) -> LiveEngine:
        model = make_model(name, max_position_embeddings=capacity)
        opened.append(LiveEngine(Engine(model, slots, backend, "float32"), capacity))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


class Clock:
    """Time for the engine that goes on by a thousandth of a second whenever it is read, however fast the machine is."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def monotonic(self) -> float:
        return next(self._ticks) / 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("thinkfast.engine.live.time", made)
    return made


def together(live: LiveEngine, *requests: tuple[Request, Callable[[Event], None]]) -> None:
    """Submits requests so that the engine sees them all at the same step."""
    live.command(lambda: [live.submit(request, listener) for request, listener in requests] and None)


class Caller:
    """Collects what it is told."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def wait(self, seconds: float = 120.0) -> tuple[list[Event], str]:
        events: list[Event] = []
        until = time.monotonic() + seconds
        while True:
            event = self.inbox.get(timeout=max(0.0, until - time.monotonic()))
            if isinstance(event, Closed):
                return events, event.reason
            events.append(event)


def samples(events: list[Event]) -> dict[int, tuple[int, ...]]:
    return {event.index: event.sample.token_ids for event in events if isinstance(event, Drawn)}


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_requests_together_get_what_each_gets_alone(
    open_engine: Open, make_model: Callable[..., Decoder], backend: str
) -> None:
    live = open_engine("hybrid", 5, backend)
    ways = [
        SamplingParams(max_tokens=20, temperature=0.0),
        SamplingParams(max_tokens=33, temperature=0.7, seed=1),
        SamplingParams(max_tokens=9, temperature=1.2, top_k=5, seed=2, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.7, top_p=0.8, seed=9, stop=((7,), (1, 2))),
    ]
    prompts = [(1, 2, 3), (4,), (5, 6, 7, 8) * 5, (9, 9)]
    callers = [Caller() for _ in ways]
    for caller, prompt, way in zip(callers, prompts, ways, strict=True):
        live.submit(Request(prompt, way, 3), caller.inbox.put)
    single = Engine(make_model("hybrid"), 3, backend, "float32")
    for caller, prompt, way in zip(callers, prompts, ways, strict=True):
        events, reason = caller.wait()
        assert reason == "complete"
        want = single.sample([prompt], 3, way)[0]
        assert samples(events) == {index: sample.token_ids for index, sample in enumerate(want)}
        for event in events:
            assert isinstance(event, Drawn)
            assert event.sample.finish_reason == want[event.index].finish_reason
            assert event.sample.logprob_sum == pytest.approx(want[event.index].logprob_sum, rel=1e-4, abs=1e-4)


def test_a_newcomer_takes_its_share_and_nothing_is_lost(open_engine: Open, make_model: Callable[..., Decoder]) -> None:
    live = open_engine("pure", 8)
    first, second = Caller(), Caller()
    brief = SamplingParams(max_tokens=5, temperature=1.0, ignore_eos=True)
    counts: list[int] = []

    def newcomer(event: Event) -> None:
        if isinstance(event, Closed):
            counts.append(live.tokens)
        second.inbox.put(event)

    def in_the_middle(event: Event) -> None:
        if isinstance(event, Closed):
            counts.append(live.tokens)
            live.submit(Request((3,), brief, 4), newcomer)

    twenty = SamplingParams(max_tokens=20, ignore_eos=True)
    together(live, (Request((1, 2), LONG, 16), first.inbox.put), (Request((4,), twenty, 1), in_the_middle))
    events, reason = second.wait()
    assert reason == "complete"
    assert counts[1] - counts[0] < 8 * 100, "it did not wait for a sample of 200 tokens to end"
    assert len(samples(events)) == 4
    events, reason = first.wait()
    assert reason == "complete"
    assert live.dropped > 0
    want = Engine(make_model("pure"), 8, kv_dtype="float32").sample([(1, 2)], 16, LONG)[0]
    assert samples(events) == {index: sample.token_ids for index, sample in enumerate(want)}


def test_requests_get_the_same_share(open_engine: Open) -> None:
    """Four requests whose samples have different lengths, until the first of them is done."""
    live = open_engine("pure", 8)
    tickets: list[Ticket] = []
    tokens: list[int] = []
    done = threading.Event()

    def told(event: Event) -> None:
        if isinstance(event, Closed) and not done.is_set():
            tokens.extend(ticket.tokens for ticket in tickets)
            done.set()

    def enter() -> None:
        for prompt, length in enumerate((7, 20, 45, 60), 1):
            params = SamplingParams(max_tokens=length, ignore_eos=True)
            tickets.append(live.submit(Request((prompt,), params, 4000 // length), told))

    live.command(enter)
    assert done.wait(120)
    assert max(tokens) <= 1.1 * min(tokens)


def test_deadlines_hand_over_what_there_is(open_engine: Open, clock: Clock) -> None:
    live = open_engine("attention", 2)
    caller = Caller()
    asked = clock.monotonic()
    live.submit(Request((1,), LONG, 500, deadline=asked + 4.0), caller.inbox.put)
    events, reason = caller.wait()
    took = clock.monotonic() - asked
    assert reason == "deadline"
    assert 4.0 <= took < 4.1
    ends = [event.sample.finish_reason for event in events if isinstance(event, Drawn)]
    assert ends.count("deadline") <= 2
    assert set(ends) <= {"deadline", "length"}
    assert ends.count("length") > 0
    assert live.requests == live.running == 0


def test_deadlines_are_kept_on_the_wall_clock(open_engine: Open) -> None:
    live = open_engine("attention", 2)
    caller = Caller()
    asked = time.monotonic()
    live.submit(Request((1,), LONG, 500, deadline=asked + 0.4), caller.inbox.put)
    events, reason = caller.wait()
    took = time.monotonic() - asked
    assert reason == "deadline"
    assert 0.39 < took < 3.0
    ends = [event.sample.finish_reason for event in events if isinstance(event, Drawn)]
    assert ends.count("deadline") <= 2
    assert set(ends) <= {"deadline", "length"}
    assert ends.count("length") > 0
    assert live.requests == live.running == 0


def test_the_earliest_deadline_is_served_first(open_engine: Open) -> None:
    live = open_engine("pure", 1)
    order: list[str] = []
    done = threading.Event()

    def told(name: str) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            if isinstance(event, Closed):
                order.append(name)
                if len(order) == 4:
                    done.set()

        return tell

    now = time.monotonic()
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    asked = (("blocks", 1.0), ("late", 900.0), ("soon", 300.0), ("middle", 600.0))
    together(live, *((Request((1,), params, 1, deadline=now + seconds + 1000), told(name)) for name, seconds in asked))
    assert done.wait(120)
    assert order == ["blocks", "soon", "middle", "late"]


@pytest.mark.parametrize("whole", [True, False])
def test_no_sample_is_started_that_cannot_end(open_engine: Open, clock: Clock, whole: bool) -> None:
    live = open_engine("pure", 2)
    caller = Caller()
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    live.submit(Request((1,), params, 100000, clock.monotonic() + 2.0, whole=whole), caller.inbox.put)
    events, reason = caller.wait()
    assert reason == "deadline"
    ends = [event.sample.finish_reason for event in events if isinstance(event, Drawn)]
    assert ends.count("length") > 2
    assert ends.count("deadline") == (0 if whole else 2)


def test_pieces_are_the_sample(open_engine: Open) -> None:
    live = open_engine("attention", 3)
    caller = Caller()
    live.submit(Request((1, 5), LONG, 4, watch=True, alternatives=3), caller.inbox.put)
    events, _ = caller.wait()
    for index, tokens in samples(events).items():
        pieces = [event for event in events if isinstance(event, Piece) and event.index == index]
        assert tuple(token for piece in pieces for token in piece.token_ids) == tokens
        (sample,) = [e.sample for e in events if isinstance(e, Drawn) and e.index == index]
        assert sum(value for piece in pieces for value in piece.logprobs) == pytest.approx(sample.logprob_sum)
        for piece in pieces:
            for token, logprob, likely in zip(piece.token_ids, piece.logprobs, piece.alternatives, strict=True):
                assert len(likely) == 3
                assert [value for _, value in likely] == sorted((value for _, value in likely), reverse=True)
                if token in dict(likely):
                    assert dict(likely)[token] == pytest.approx(logprob, abs=1e-5)
                else:
                    assert logprob <= likely[-1][1] + 1e-6


def test_cancelling_and_ending_free_slots_within_a_step(open_engine: Open) -> None:
    live = open_engine("pure", 2, capacity=50_000)
    caller, other = Caller(), Caller()
    endless = SamplingParams(max_tokens=49_000, ignore_eos=True)
    ticket = live.submit(Request((1,), endless, 100000, watch=True), caller.inbox.put)
    assert isinstance(caller.inbox.get(timeout=120), Piece)
    ticket.cancel()
    _, reason = caller.wait()
    assert reason == "cancelled"
    assert live.running == 0
    known, lengths = threading.Event(), []

    def told(event: Event) -> None:
        if isinstance(event, Piece) and not lengths:
            assert known.wait(120)
            lengths.append(len(event.token_ids))
            ticket.end(0)
        other.inbox.put(event)

    ticket = live.submit(Request((1,), endless, 1, watch=True), told)
    known.set()
    events, reason = other.wait()
    assert reason == "complete"
    (sample,) = [event.sample for event in events if isinstance(event, Drawn)]
    assert sample.finish_reason == "stop"
    assert len(sample.token_ids) <= lengths[0] + 1
    ticket.cancel()
    ticket.end(0)


def test_handing_back_and_closing(open_engine: Open) -> None:
    live = open_engine("pure", 2, capacity=50_000)
    caller = Caller()
    endless = SamplingParams(max_tokens=49_000, ignore_eos=True)
    live.submit(Request((1,), endless, 100000, watch=True), caller.inbox.put)
    assert isinstance(caller.inbox.get(timeout=120), Piece)
    live.hand_back(time.monotonic() + 0.2)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        live.submit(Request((1,), LONG, 1), caller.inbox.put)
    events, reason = caller.wait()
    assert reason == "deadline"
    assert [e.sample.finish_reason for e in events if isinstance(e, Drawn)] == ["deadline", "deadline"]
    assert all(0 < len(tokens) < 49_000 for tokens in samples(events).values())
    live = open_engine("pure", 2)
    caller = Caller()
    live.submit(Request((1,), LONG, 100000), caller.inbox.put)
    live.close()
    assert caller.wait()[1] == "closed"
    live.close()


def test_an_engine_that_breaks_says_so(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    live = open_engine("pure", 2)

    def fails(*given: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(live._memory, "prefill", fails)
    caller = Caller()
    live.submit(Request((1,), LONG, 1), caller.inbox.put)
    assert caller.wait()[1] == "MemoryError: no room"
    assert live.broken == "MemoryError: no room"
    with pytest.raises(RuntimeError, match="MemoryError: no room"):
        live.submit(Request((1,), LONG, 1), caller.inbox.put)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request((), LONG, 1), "prompt 0 is empty"),
        (Request((50,), LONG, 1), "holds token id 50, expected 0 to 49"),
        (Request((1,), LONG, 0), "n is 0, expected 1 or more"),
        (Request((1,) * 100, LONG, 1), "100 tokens and max_tokens is 200"),
    ],
)
def test_what_cannot_be_served_is_refused(open_engine: Open, request_: Request, told: str) -> None:
    live = open_engine("pure", 2)
    with pytest.raises(BadInput, match=told):
        live.submit(request_, lambda event: None)


def test_capacity_bounds_prompt_and_answer(make_model: Callable[..., Decoder]) -> None:
    live = LiveEngine(Engine(make_model("pure"), 2), 64)
    assert live.capacity == 64
    with pytest.raises(BadInput, match="65 tokens, more than the engine's capacity of 64"):
        live.submit(Request((1,), SamplingParams(max_tokens=64), 1), lambda event: None)
    live.close()


def test_memory_stays_flat_over_many_requests(open_engine: Open) -> None:
    live = open_engine("pure", 4)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    callers = [Caller() for _ in range(60)]
    for seed, caller in enumerate(callers):
        live.submit(Request((1 + seed % 40,), params, 2), caller.inbox.put)
    for caller in callers:
        assert len(samples(caller.wait()[0])) == 2
    assert live.requests == 0
    assert not any(live._owner)
    assert np.count_nonzero(live._table.active) == 0
