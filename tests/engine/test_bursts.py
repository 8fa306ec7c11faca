"""Several steps in a row: the same tokens as step by step, and no step too many."""

import math
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkfast.engine.backends import AHEAD, FEW, NativeBackend, NativeMemory
from thinkfast.engine.engine import Engine
from thinkfast.engine.sampling import NOT_DRAWN, SamplingParams, sample_key
from thinkfast.engine.slots import SlotTable
from thinkfast.model.decoder import Decoder

VOCAB, ROWS = 6, 4
LONG = 200
EOS = 5


def table_of(limits: list[int], stop: bool, runs_on: list[bool]) -> SlotTable:
    params = SamplingParams(max_tokens=9, stop=((1, 2),) if stop else ())
    table = SlotTable(ROWS, params, VOCAB, (EOS,))
    for slot, (limit, ignore) in enumerate(zip(limits, runs_on, strict=True)):
        how = SamplingParams(max_tokens=limit, stop=params.stop, ignore_eos=ignore)
        table.admit(slot, (0, slot), 1, 7, sample_key(0, slot), 0.0, how)
    return table


@pytest.fixture(scope="module")
def kernels(make_model: Callable[..., Decoder]) -> NativeMemory:
    return NativeBackend(make_model("pure"), "float32").memory(1, 1)


@given(
    tokens=st.lists(st.lists(st.integers(-1, VOCAB - 1), min_size=ROWS, max_size=ROWS), min_size=1, max_size=6),
    limits=st.lists(st.integers(1, 6), min_size=ROWS, max_size=ROWS),
    drawn=st.lists(st.integers(1, 6), min_size=ROWS, max_size=ROWS),
    stop=st.booleans(),
    runs_on=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
)
def test_steps_taken_together_leave_what_single_steps_leave(
    kernels: NativeMemory,
    tokens: list[list[int]],
    limits: list[int],
    drawn: list[int],
    stop: bool,
    runs_on: list[bool],
) -> None:
    """Whatever stands behind the end of a sample or its limit, or was not drawn."""
    steps = np.array(tokens, np.int32)
    scores = np.random.default_rng(len(tokens)).normal(size=steps.shape)
    for row, length in enumerate(drawn):
        steps[length:, row] = NOT_DRAWN
    rows = np.array([2, 0, 3, 1], np.int32)
    one = table_of(limits, stop, runs_on)
    ended = []
    for now, logprobs in zip(steps, scores, strict=True):
        on = one.active[rows] & (now != NOT_DRAWN)
        ended += one.advance(rows[on], now[on], logprobs[on])
    ways = {"numpy": table_of(limits, stop, runs_on), "kernels": table_of(limits, stop, runs_on)}
    for name, table in ways.items():
        if name == "kernels" and table.stops:
            continue
        got = table.advance_all(rows, steps, scores) if name == "numpy" else kernels.settle(table, rows, steps, scores)
        assert sorted((done.slot, done.reason) for done in got) == sorted((done.slot, done.reason) for done in ended)
        for column in ("active", "token", "position", "count", "logprob"):
            assert np.array_equal(getattr(table, column), getattr(one, column)), (name, column)
        for slot in range(ROWS):
            assert table.sample(slot, "stop", 1.0) == one.sample(slot, "stop", 1.0), name


def native(model: Decoder, rows: int) -> tuple[NativeMemory, SlotTable]:
    memory = NativeBackend(model, "float32").memory(rows, 100)
    table = SlotTable(rows, SamplingParams(max_tokens=LONG + 20, temperature=1.3), model.config.vocab_size, (EOS,))
    for slot in range(rows):
        prompt = [1 + slot % 7] * (1 + slot % 5)
        memory.fork(memory.prefill([prompt[:-1]])[0], slot)
        table.admit(slot, (0, slot), prompt[-1], len(prompt) - 1, sample_key(3, slot), 0.0)
    table.count[:] = LONG  # as in the middle of a chain
    return memory, table


@pytest.mark.parametrize("name", ["attention", "hybrid", "pure"])
@pytest.mark.parametrize("rows", [1, 2, 75])
def test_the_kernels_draw_in_a_row_what_they_draw_one_by_one(
    make_model: Callable[..., Decoder], name: str, rows: int
) -> None:
    every = np.arange(rows, dtype=np.int32)
    memory, table = native(make_model(name), rows)
    tokens, logprobs = memory.run_ahead(table, every, math.inf)
    assert tokens.shape == (AHEAD, rows)
    memory, table = native(make_model(name), rows)
    ends = 0
    for step in range(AHEAD):
        on = every[table.active[every]]
        want, scores = memory.step(table, on)
        assert np.array_equal(tokens[step, on], want)
        assert np.array_equal(logprobs[step, on], scores)
        off = np.setdiff1d(every, on)
        ends += len(off)
        assert (tokens[step, off] == NOT_DRAWN).all(), "a row that has ended takes no step"
        table.advance(on, want, scores)
    assert rows < 75 or ends, "some sample ends before the last step"


@pytest.mark.parametrize("name", ["attention", "hybrid", "pure"])
def test_a_thread_that_is_done_takes_half_of_anothers_rows(
    make_model: Callable[..., Decoder], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first tile's rows have room for one token: the other threads are soon done."""
    monkeypatch.setattr("thinkfast.engine.backends.IDLE", 0)  # however many rows end early
    monkeypatch.setattr("thinkfast.engine.backends.AHEAD", 300)  # the others must have time to wake
    rows, kept, model = 90, 30, NativeBackend(make_model(name), "float32").model
    params = SamplingParams(max_tokens=300, temperature=1.3, ignore_eos=True)
    every, found = np.arange(rows, dtype=np.int32), []
    for threads in (1, 3):
        memory = NativeMemory(model, rows, 310, False, threads)
        table = SlotTable(rows, params, make_model(name).config.vocab_size, ())
        for slot in range(rows):
            memory.fork(memory.prefill([[1 + slot % 7] * (slot % 5)])[0], slot)
            table.admit(slot, (0, slot), 2, slot % 5, sample_key(3, slot), 0.0)
        table.count[kept:] = 299
        tokens, logprobs = memory.run_ahead(table, every, math.inf)
        assert (tokens[1:, kept:] == NOT_DRAWN).all()
        assert (tokens[-1, :kept] != NOT_DRAWN).all()
        found.append((tokens, logprobs))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1], equal_nan=True)


def test_rows_of_one_call_draw_in_ways_of_their_own(make_model: Callable[..., Decoder]) -> None:
    ways = [SamplingParams(max_tokens=40, **how) for how in ({"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.4}, {})]
    every, found = np.arange(8, dtype=np.int32), []
    for alone in (False, True):
        memory, table = native(make_model("hybrid"), 8)
        for slot in range(8):
            prompt = int(table.token[slot]), int(table.position[slot])
            table.admit(slot, (0, slot), *prompt, sample_key(3, slot), 0.0, ways[slot % 4])
        parts = [every[at :: len(ways)].copy() for at in range(len(ways))] if alone else [every]
        drawn = np.empty(8, np.int32)
        for part in parts:
            drawn[part] = memory.step(table, part)[0]
        found.append(drawn)
    assert np.array_equal(found[0], found[1])


def test_a_row_has_room_for_so_many_tokens(make_model: Callable[..., Decoder]) -> None:
    memory, table = native(make_model("hybrid"), 3)
    table.count[:] = LONG + 17, LONG + 19, LONG
    tokens, _ = memory.run_ahead(table, np.arange(3, dtype=np.int32), math.inf)
    assert ((tokens != NOT_DRAWN).sum(axis=0) <= [3, 1, AHEAD]).all()


@pytest.mark.parametrize("rows", [1, 75])
def test_no_step_is_begun_when_the_time_is_over_or_somebody_calls(
    make_model: Callable[..., Decoder], rows: int
) -> None:
    every = np.arange(rows, dtype=np.int32)
    memory, table = native(make_model("hybrid"), rows)
    assert ((memory.run_ahead(table, every, 0.0)[0] != NOT_DRAWN).sum(axis=0) == 1).all()
    memory.interrupt(True)
    assert ((memory.run_ahead(table, every, math.inf)[0] != NOT_DRAWN).sum(axis=0) == 1).all()
    memory.interrupt(False)
    assert (memory.run_ahead(table, every, math.inf)[0] != NOT_DRAWN).sum() > rows


def test_a_call_from_another_thread_ends_a_row_of_steps(make_model: Callable[..., Decoder]) -> None:
    memory = NativeBackend(make_model("hybrid"), "float32").memory(4, 5000)
    table = SlotTable(4, SamplingParams(max_tokens=4900, ignore_eos=True), make_model("hybrid").config.vocab_size, ())
    every = np.arange(4, dtype=np.int32)
    for slot in range(4):
        memory.fork(memory.prefill([[]])[0], slot)
        table.admit(slot, (0, slot), 1, 0, sample_key(3, slot), 0.0)
    caller = threading.Timer(0.05, memory.interrupt, (True,))
    caller.start()
    while True:  # rows of steps follow each other until the call falls into one of them or between two
        tokens, logprobs = memory.run_ahead(table, every, math.inf)
        table.advance_all(every, tokens, logprobs)
        if (tokens[1:] == NOT_DRAWN).any() or not table.active.all():
            break
        time.sleep(0)
    caller.join()
    assert table.active.all(), "the call came before the samples were done"


def test_streams_do_not_depend_on_the_length_of_a_row_of_steps(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.2, stop=((3,),), seed=5)
    drawn = {}
    for ahead in (1, 3, AHEAD):
        monkeypatch.setattr("thinkfast.engine.backends.AHEAD", ahead)
        samples = Engine(make_model("hybrid"), 5).sample([[1, 2], [4, 4, 4]], 9, params)
        drawn[ahead] = [[(s.token_ids, s.finish_reason, s.logprob_sum) for s in row] for row in samples]
    assert drawn[1] == drawn[3] == drawn[AHEAD]


def test_chains_that_have_been_short_so_far_are_looked_at_often(make_model: Callable[..., Decoder]) -> None:
    """Any token may be their last, and their slots are wanted; unless they run on."""
    memory, table = native(make_model("hybrid"), 3)
    table.count[:] = 2
    every = np.arange(3, dtype=np.int32)
    assert len(memory.run_ahead(table, every, 0.0)[0]) == FEW
    table.admit(0, (0, 0), 1, 0, 7, 0.0, SamplingParams(max_tokens=200, ignore_eos=True))
    assert len(memory.run_ahead(table, every[:1], 0.0)[0]) == AHEAD
