"""Deadlines by the count of steps, on a clock that only work moves."""

import queue
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from thinkfast.engine import engine as engine_module
from thinkfast.engine import live as live_module
from thinkfast.engine import prefill
from thinkfast.engine.backends import Kept, Memory
from thinkfast.engine.engine import Engine
from thinkfast.engine.live import LiveEngine
from thinkfast.engine.request import Closed, Drawn, Event, Request
from thinkfast.engine.sampling import SamplingParams
from thinkfast.engine.slots import SlotTable
from thinkfast.model.decoder import Decoder

ENDLESS = SamplingParams(max_tokens=150, ignore_eos=True, seed=1)


class Ticking:
    """A memory whose every step and every piece of a prompt takes one second of a clock of its own."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.slots, self.capacity = memory, memory.slots, memory.capacity
        self.fork = memory.fork
        self.now = 0.0
        self.steps = 0

    def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None] = ()) -> list[Kept]:
        self.now += 1
        return self.memory.prefill(prompts, behind)

    def step(self, table: SlotTable, rows: np.ndarray, logits: np.ndarray | None = None) -> object:
        self.now += 1
        self.steps += 1
        return self.memory.step(table, rows, logits)


@pytest.mark.parametrize("name", ["hybrid", "attention", "pure"])
@pytest.mark.parametrize("deadline", [0.5, 1.0, 2.5, 7.0, 9.5, 20.25])
def test_a_call_ends_at_its_deadline_or_within_one_step(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, name: str, deadline: float
) -> None:
    engine = Engine(make_model(name), 3)
    memory = Ticking(engine.open_memory(engine.slots, 256))
    monkeypatch.setattr(engine, "_take_memory", lambda slots, capacity: memory)
    monkeypatch.setattr(prefill, "CHUNK", 8)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: memory.now))
    prompts = [[1, 2], [3] * 50, [4]]
    drawn = list(engine.stream(prompts, 2, ENDLESS, deadline))
    assert memory.now == np.ceil(deadline), "not a step less, and at most one beyond"
    assert all(sample.t_end == memory.now and sample.finish_reason == "deadline" for _, _, sample in drawn)
    whole = [[sample.token_ids for sample in row] for row in Engine(make_model(name), 3).sample(prompts, 2, ENDLESS)]
    for prompt, index, sample in drawn:
        assert sample.token_ids == whole[prompt][index][: len(sample.token_ids)]
    if deadline > 2:
        assert any(sample.token_ids for _, _, sample in drawn)


def test_samples_that_end_before_the_deadline_are_whole(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(make_model("hybrid"), 2)
    memory = Ticking(engine.open_memory(engine.slots, 256))
    monkeypatch.setattr(engine, "_take_memory", lambda slots, capacity: memory)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: memory.now))
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    reasons = [[s.finish_reason for s in row] for row in engine.sample([[1, 2], [3]], 2, params, deadline=15)]
    assert reasons == [["length", "deadline"], ["length", "deadline"]]
    assert [s.t_end for _, _, s in engine.stream([[1, 2]], 2, params, deadline=100)] == [11.0, 11.0]


class Stage:
    """A live engine on a ticking clock, which waits for its cue before it starts work on what was submitted."""

    def __init__(self, model: Decoder, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
        self.live = LiveEngine(Engine(model, slots), 256)
        self.memory = Ticking(self.live._memory)
        self.live._memory = self.memory
        monkeypatch.setattr(live_module, "time", SimpleNamespace(monotonic=lambda: self.memory.now))
        self.inbox: queue.SimpleQueue[tuple[int, Event, float, int]] = queue.SimpleQueue()

    def start(self, requests: list[Request], tell: Callable[[Event], None] = lambda event: None) -> list[object]:
        waiting, cue = threading.Event(), threading.Event()

        def wait() -> None:
            waiting.set()
            cue.wait(60)

        self.live.command(wait)
        assert waiting.wait(60), "from here on all commands are obeyed together"
        tickets = []
        for number, request in enumerate(requests):

            def told(event: Event, number: int = number) -> None:
                tell(event)
                self.inbox.put((number, event, self.memory.now, self.live.running))

            try:
                tickets.append(self.live.submit(request, told))
            except BaseException:
                cue.set()
                raise
        cue.set()
        return tickets


@pytest.mark.parametrize("deadline", [1.0, 4.5, 30.0])
def test_a_request_ends_at_its_deadline_or_within_one_step(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, deadline: float
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", 8)
    stage = Stage(make_model("hybrid"), monkeypatch, 4)
    try:
        stage.start([Request((1,), ENDLESS, 50, deadline), Request((2,) * 80, ENDLESS, 1, deadline + 7)])
        closed: dict[int, float] = {}
        while len(closed) < 2:
            number, event, now, _ = stage.inbox.get(timeout=60)
            if isinstance(event, Closed):
                assert event.reason == "deadline"
                closed[number] = now
            elif isinstance(event, Drawn):
                assert event.sample.t_end == now
        assert closed == {0: np.ceil(deadline), 1: np.ceil(deadline + 7)}
    finally:
        stage.live.close()


def test_a_cancelled_request_frees_its_slots_before_the_next_step(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(make_model("pure"), monkeypatch, 3)
    rows: list[tuple[float, int]] = []
    step = stage.memory.step

    def cancelling(table: SlotTable, at: np.ndarray, logits: np.ndarray | None = None) -> object:
        drawn = step(table, at, logits)
        rows.append((stage.memory.now, len(at)))
        if len(rows) == 5:
            assert known.wait(60)
            stage.live.command(lambda: tickets[0].cancel())
        return drawn

    stage.memory.step = cancelling
    tickets: list[object] = []
    known = threading.Event()
    try:
        brief = SamplingParams(max_tokens=9, ignore_eos=True)
        tickets += stage.start([Request((1,), ENDLESS, 2), Request((2,), brief, 1)])
        known.set()
        told = [stage.inbox.get(timeout=60) for _ in range(3)]
    finally:
        stage.live.close()
    (cancelled,) = [(number, now) for number, event, now, _ in told if event == Closed("cancelled")]
    # The command arrives during step 5 and asks for the cancelling, which is obeyed before or behind step 6.
    assert cancelled[0] == 0
    assert cancelled[1] <= rows[5][0]
    assert [count for _, count in rows] in ([3] * 5 + [1] * 4, [3] * 6 + [1] * 3)
