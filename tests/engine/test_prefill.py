"""Prompts fed in pieces between the steps of running samples: the same tokens, and nobody stands still."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from thinkfast.engine import prefill
from thinkfast.engine.backends import Kept, Memory, open_backend
from thinkfast.engine.engine import Engine
from thinkfast.engine.live import Closed, Drawn, Event, LiveEngine, Request
from thinkfast.engine.sampling import SamplingParams
from thinkfast.engine.slots import SlotTable
from thinkfast.model.cache import Cache
from thinkfast.model.decoder import Decoder

PARAMS = SamplingParams(max_tokens=30, temperature=0.9, seed=7, ignore_eos=True)
LONG = tuple(int(token) for token in np.random.default_rng(0).integers(0, 37, 200))


class Watched:
    """A memory that notes what it is asked for: the sizes of the pieces it is fed, or the rows it steps."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.slots, self.capacity = memory, memory.slots, memory.capacity
        self.fork = memory.fork
        self.log: list[tuple[str, list[int]]] = []

    def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None] = ()) -> list[Kept]:
        self.log.append(("feed", [len(prompt) for prompt in prompts]))
        return self.memory.prefill(prompts, behind)

    def step(self, table: SlotTable, rows: np.ndarray, logits: np.ndarray | None = None) -> object:
        self.log.append(("step", rows.tolist()))
        return self.memory.step(table, rows, logits)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_native_prefill_is_bitwise_the_same_wherever_it_is_cut(any_model: Decoder, kv_dtype: str) -> None:
    ids = np.random.default_rng(1).integers(0, any_model.config.vocab_size, 150).tolist()
    memory = open_backend(any_model, "native", kv_dtype).memory(3, 160)
    (whole,) = memory.prefill([ids])
    for cuts in ([1], [64], [65, 66], [10, 10, 149], [50, 100]):
        kept: Kept | None = None
        for start, end in zip([0, *cuts], [*cuts, 150], strict=True):
            # Neighbours with other starts, one of them behind nothing.
            kept, _, _ = memory.prefill([ids[start:end], ids[:7], ids[7:9]], [kept, None, memory.prefill([ids[:7]])[0]])
        assert kept is not None
        assert kept.length == 150
        np.testing.assert_array_equal(kept.state.contents(), whole.state.contents())


def test_torch_prefill_is_the_same_wherever_it_is_cut(any_model: Decoder) -> None:
    ids = np.random.default_rng(1).integers(0, any_model.config.vocab_size, 150)
    with torch.no_grad():
        want = any_model(torch.from_numpy(ids)[None])[0, -1].numpy()
    memory = open_backend(any_model, "torch").memory(1, 150)
    for cuts in ([], [64], [3, 90]):
        kept: Kept | None = None
        for start, end in zip([0, *cuts], [*cuts, 149], strict=True):
            (kept,) = memory.prefill([ids[start:end].tolist()], [kept])
        assert kept is not None
        memory.fork(kept, 0)
        table = SlotTable(1, PARAMS, 50, ())
        table.admit(0, (0, 0), int(ids[149]), 149, 0, 0.0)
        logits = np.empty((1, len(want)), np.float32)
        memory.step(table, np.zeros(1, np.int32), logits)
        np.testing.assert_allclose(logits[0], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["hybrid", "attention", "pure"])
def test_samples_step_on_while_a_long_prompt_is_fed(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, name: str, backend: str
) -> None:
    prompts = [(1, 2, 3), LONG, (4,), LONG[:100], (1, 2, 3)]
    engine = Engine(make_model(name), 4, backend, "float32")
    want = [[s.token_ids for s in row] for row in engine.sample(prompts, 3, PARAMS)]
    monkeypatch.setattr(prefill, "CHUNK", 16)
    monkeypatch.setattr(prefill, "ROUND", 40)
    memory = Watched(engine.open_memory(engine.slots, 256))
    monkeypatch.setattr(engine, "_take_memory", lambda slots, capacity: memory)
    assert [[s.token_ids for s in row] for row in engine.sample(prompts, 3, PARAMS)] == want
    fed = [sizes for kind, sizes in memory.log if kind == "feed"]
    assert all(size <= 16 for sizes in fed for size in sizes)
    assert all(sum(sizes) <= 40 for sizes in fed)
    assert sum(sum(sizes) for sizes in fed) == 2 + 199 + 0 + 99, "each prompt once, the one listed twice too"
    first = [kind for kind, _ in memory.log].index("step")
    for (kind, _), (following, _) in pairwise(memory.log[first:]):
        assert "step" in (kind, following), "two pieces were fed while samples stood still"


def test_a_round_is_filled_and_not_more() -> None:
    class Counting:
        def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None]) -> list[Kept]:
            fed.append([len(prompt) for prompt in prompts])
            return [
                Kept(len(prompt) + (before.length if before else 0), np.empty(0, np.uint8))
                for prompt, before in zip(prompts, behind, strict=True)
            ]

    fed: list[list[int]] = []
    waiting = [prefill.Prefix(range(size + 1)) for size in (600, 100, 156, 1, 40)]
    while unready := [prefix for prefix in waiting if not prefix.ready]:
        prefill.feed(Counting(), unready)
    assert fed == [[256, 100, 156], [256, 1, 40], [88]]
    assert prefill.Prefix((5,)).ready is False, "an empty prefix still needs a state"


def test_live_requests_step_on_and_share_equal_prompts(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "CHUNK", 16)
    live = LiveEngine(Engine(make_model("hybrid"), 4, kv_dtype="float32"), 256)
    memory = Watched(live._memory)
    live._memory = memory
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    stepped = threading.Event()
    try:
        endless = SamplingParams(max_tokens=200, ignore_eos=True)
        blocker = live.submit(Request((9,), endless, 10_000, watch=True), lambda event: stepped.set())
        assert stepped.wait(60)
        start = len(memory.log)
        both = threading.Barrier(2)
        live.command(lambda: both.wait(60))  # so that the two arrive between the same two steps
        for _ in range(2):
            live.submit(Request(LONG, PARAMS, 2), inbox.put)
        both.wait(60)
        drawn: list[tuple[int, tuple[int, ...]]] = []
        closed = 0
        while closed < 2:
            event = inbox.get(timeout=60)
            closed += isinstance(event, Closed)
            if isinstance(event, Drawn):
                drawn.append((event.index, event.sample.token_ids))
        blocker.cancel()
    finally:
        live.close()
    want = Engine(make_model("hybrid"), 4, kv_dtype="float32").sample([LONG], 2, PARAMS)[0]
    assert sorted(drawn) == sorted([(0, want[0].token_ids), (1, want[1].token_ids)] * 2)
    log = memory.log[start:]
    assert sum(sum(sizes) for kind, sizes in log if kind == "feed") == 199
    for (kind, _), (following, _) in pairwise(log):
        assert "step" in (kind, following)


def fed(tokens: Sequence[int], size: int) -> prefill.Prefix:
    """A prompt of these tokens and one more, fed whole."""
    prefix = prefill.Prefix([*tokens, 0], size)
    prefix.kept = Kept(len(tokens), Cache([]))
    assert prefix.ready
    return prefix


def test_the_shelf_gives_each_state_once_and_only_for_its_own_tokens() -> None:
    shelf, state = prefill.Shelf(100), fed((1, 2), 40)
    shelf.put(state)
    assert shelf.take((1,)) is shelf.take((1, 2, 3)) is shelf.take(()) is None
    assert shelf.take((1, 2)) is state
    assert shelf.take((1, 2)) is None, "two who ask at once must not both own it"


def test_the_shelf_forgets_what_was_used_longest_ago() -> None:
    shelf = prefill.Shelf(100)
    states = [fed((number,), 40) for number in range(3)]
    shelf.put(states[0])
    shelf.put(states[1])
    assert shelf.take((0,)) is states[0]
    shelf.put(states[0])  # used now
    shelf.put(states[2])
    assert shelf.take((1,)) is None
    assert shelf.take((0,)) is states[0]
    assert shelf.take((2,)) is states[2]


def test_the_shelf_counts_what_it_holds() -> None:
    shelf, twin = prefill.Shelf(100), fed((0,), 60)
    shelf.put(fed((0,), 60))
    shelf.put(twin)  # the same tokens once more take no more room
    shelf.put(fed((1,), 40))
    assert shelf.take((0,)) is twin
    shelf.put(fed((2,), 60))  # 100 of 100
    assert shelf.take((1,)) is not None
    assert shelf.take((2,)) is not None
    shelf.put(fed((3,), 50))
    shelf.put(fed((4,), 101))
    assert shelf.take((4,)) is None
    assert shelf.take((3,)) is not None, "what never fits drives nobody out"
    shelf.put(fed((5,), 100))
    assert shelf.take((5,)) is not None


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_who_asks_the_same_again_feeds_nothing(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    engine = Engine(make_model("hybrid"), 2, backend, "float32")
    memory = Watched(engine.open_memory(2, 256))
    monkeypatch.setattr(engine, "open_memory", lambda slots, capacity: memory)
    live = LiveEngine(engine, 256)

    def ask(prompt: tuple[int, ...], seed: int) -> tuple[int, ...]:
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        live.submit(Request(prompt, replace(PARAMS, seed=seed), 1), inbox.put)
        drawn = inbox.get(timeout=120)
        assert isinstance(drawn, Drawn)
        assert isinstance(inbox.get(timeout=120), Closed)
        return drawn.sample.token_ids

    first = ask(LONG, 7)
    pieces = [sizes for kind, sizes in memory.log if kind == "feed"]
    assert sum(map(sum, pieces)) == len(LONG) - 1
    other = ask(LONG, 8)
    assert [sizes for kind, sizes in memory.log if kind == "feed"] == pieces, "another seed, the same state"
    assert ask(LONG, 7) == first != other
    ask(LONG[:-1], 7)
    assert [sizes for kind, sizes in memory.log if kind == "feed"] == [*pieces, [len(LONG) - 2]]
    live.close()
    want = Engine(make_model("hybrid"), 2, backend, "float32").sample([LONG], 1, PARAMS)[0][0]
    assert first == want.token_ids
