"""Which sample is drawn next, and the running samples as columns of arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinkfast.engine.sampling import ERROR, LENGTH, NOT_DRAWN, STOP, Sample, SamplingParams


class Rounds:
    """The pairs (prompt, sample) still to draw: sample j of every prompt before sample j + 1 of any.

    Prompts in `dropped`, which may grow meanwhile, are handed out no more.
    """

    def __init__(
        self, prompts: int, n: int, skip: Collection[tuple[int, int]] = (), dropped: Collection[int] = ()
    ) -> None:
        drawn = frozenset(skip)
        skipped = Counter(prompt for prompt, sample in drawn if 0 <= prompt < prompts and 0 <= sample < n)
        self._left = [n - skipped[prompt] for prompt in range(prompts)]
        every = ((prompt, sample) for sample in range(n) for prompt in range(prompts))
        self._pairs = (pair for pair in every if pair not in drawn)
        self._dropped = dropped
        self._next = next(self._pairs, None)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        pair = self.head
        if pair is None:
            raise StopIteration
        self._next = next(self._pairs, None)
        self._left[pair[0]] -= 1
        return pair

    @property
    def head(self) -> tuple[int, int] | None:
        """The pair that comes next."""
        while self._next is not None and self._next[0] in self._dropped:
            self._next = next(self._pairs, None)
        return self._next

    def left(self, prompt: int) -> int:
        """Samples of a prompt that have not been handed out."""
        return self._left[prompt]


@dataclass(slots=True)
class Finished:
    """A sample that has left its slot."""

    slot: int
    reason: str


class SlotTable:
    """The running samples. Row i of every column belongs to slot i; only slots in `active` mean anything.

    Every slot has sampling parameters of its own: `params` where `admit` is given no others. A sample draws at most
    `room` tokens, by default max_tokens of `params`.
    """

    def __init__(
        self, slots: int, params: SamplingParams, vocab: int, eos: tuple[int, ...], room: int | None = None
    ) -> None:
        self.params = [params] * slots
        self.pair: list[tuple[int, int]] = [(-1, -1)] * slots
        self.active = np.zeros(slots, bool)
        self.token = np.zeros(slots, np.int32)
        self.position = np.zeros(slots, np.int32)
        self.key = np.zeros(slots, np.uint64)
        self.count = np.zeros(slots, np.int64)
        self.logprob = np.zeros(slots, np.float64)
        self.started = np.zeros(slots, np.float64)
        width = params.max_tokens if room is None else room
        self.history = np.zeros((slots, width), np.int32)
        self.history_logprob = np.zeros((slots, width), np.float64)
        self.eos = np.zeros(vocab, bool)
        self.eos[[token for token in eos if 0 <= token < vocab]] = True
        self.stops = False
        """Whether a sample may end with a stop sequence."""
        self._stop_last = np.zeros(vocab, bool)
        self.limit = np.zeros(slots, np.int64)
        self._runs_on = np.zeros(slots, bool)
        self.way = np.zeros((slots, 3), np.float64)
        """Temperature, top_p and top_k."""
        for slot in range(slots):
            self._set(slot, params)

    def _set(self, slot: int, params: SamplingParams) -> None:
        self.params[slot] = params
        self.limit[slot] = min(params.max_tokens, self.history.shape[1])
        self._runs_on[slot] = params.ignore_eos
        self.way[slot] = params.temperature, params.top_p, params.top_k
        # Stays marked when the sample is gone: a mark only makes `advance` look closer.
        self.stops |= bool(params.stop)
        self._stop_last[[stop[-1] for stop in params.stop if 0 <= stop[-1] < len(self._stop_last)]] = True

    def admit(
        self,
        slot: int,
        pair: tuple[int, int],
        token: int,
        position: int,
        key: int,
        now: float,
        params: SamplingParams | None = None,
    ) -> None:
        """Starts a sample whose next input is `token` at `position`."""
        if params is not None and params is not self.params[slot]:
            self._set(slot, params)
        self.pair[slot], self.active[slot] = pair, True
        self.token[slot], self.position[slot], self.key[slot] = token, position, key
        self.count[slot], self.logprob[slot], self.started[slot] = 0, 0.0, now

    def groups(self, rows: NDArray[np.int32]) -> list[tuple[SamplingParams, NDArray[np.intp] | slice]]:
        """The places in `rows` whose tokens are drawn in one way (temperature, top_k, top_p), for every such way."""
        how = self.way[rows]
        if not len(rows) or (how == how[0]).all():
            return [(self.params[rows[0]], slice(None))] if len(rows) else []
        _, first, group = np.unique(how, axis=0, return_index=True, return_inverse=True)
        return [(self.params[rows[at]], np.flatnonzero(group == index)) for index, at in enumerate(first)]

    def room(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """How many tokens each of the slots may still draw, at least one."""
        left: NDArray[np.int32] = np.maximum(self.limit[rows] - self.count[rows], 1).astype(np.int32)
        return left

    def ends(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether an end-of-sequence token ends the samples in these slots."""
        return ~self._runs_on[rows]

    def advance(
        self, rows: NDArray[np.int32], tokens: NDArray[np.int32], logprobs: NDArray[np.float64]
    ) -> list[Finished]:
        """Appends the drawn tokens to the slots in `rows`; returns those that end, which become free."""
        count, broken = self.count[rows], tokens < 0
        known = np.where(broken, 0, tokens)
        ended = self.eos[known] & ~broken & ~self._runs_on[rows]
        self.logprob[rows] += np.where(broken, 0.0, logprobs)
        self.history[rows, count] = known  # means nothing unless the count grows over it
        self.history_logprob[rows, count] = logprobs
        count += ~(ended | broken)
        self.count[rows], self.token[rows] = count, known
        self.position[rows] += 1
        full = count >= self.limit[rows]
        candidates = np.flatnonzero(broken | ended | full | self._stop_last[known])
        finished = []
        for at in candidates:
            slot = int(rows[at])
            if broken[at]:
                finished.append(Finished(slot, ERROR))
            elif ended[at] or self._stopped(slot):
                finished.append(Finished(slot, STOP))
            elif full[at]:
                finished.append(Finished(slot, LENGTH))
        for done in finished:
            self.active[done.slot] = False
        return finished

    def advance_all(
        self, rows: NDArray[np.int32], tokens: NDArray[np.int32], logprobs: NDArray[np.float64]
    ) -> list[Finished]:
        """`advance` over several steps: tokens, logprobs (steps, rows). What stands behind a sample's end is left out.

        NOT_DRAWN marks steps that a row did not take.
        """
        if len(tokens) == 1 and tokens.min(initial=0) > NOT_DRAWN:
            return self.advance(rows, tokens[0], logprobs[0])
        known = np.maximum(tokens, 0)
        if self._stop_last[known].any():  # the history must be looked at after every step
            finished = []
            for drawn, scores in zip(tokens, logprobs, strict=True):
                on = self.active[rows] & (drawn != NOT_DRAWN)
                finished += self.advance(rows[on], drawn[on], scores[on])
            return finished
        held = self.count[rows]
        taken = (tokens != NOT_DRAWN) & (held + np.arange(len(tokens))[:, None] < self.limit[rows])
        broken = taken & (tokens < 0)
        ended = taken & self.eos[known] & ~broken & ~self._runs_on[rows]
        over = ended | broken
        taken &= np.cumsum(over, axis=0) == over  # nothing behind the first end
        step, at = np.nonzero(taken)
        self.history[rows[at], held[at] + step] = known[step, at]
        self.history_logprob[rows[at], held[at] + step] = logprobs[step, at]
        for scores in np.where(taken & ~broken, logprobs, 0.0):
            self.logprob[rows] += scores
        length, broke, stopped = taken.sum(axis=0), (broken & taken).any(axis=0), (ended & taken).any(axis=0)
        count = held + length - (broke | stopped)
        some = np.flatnonzero(length)
        self.count[rows], self.token[rows[some]] = count, known[length[some] - 1, some]
        self.position[rows] += length.astype(np.int32)
        full = count >= self.limit[rows]
        finished = []
        for row in np.flatnonzero(broke | stopped | full):
            reason = ERROR if broke[row] else STOP if stopped[row] else LENGTH
            finished.append(Finished(int(rows[row]), reason))
            self.active[rows[row]] = False
        return finished

    def sample(self, slot: int, reason: str, now: float, origin: float = 0.0) -> Sample:
        """What a slot has drawn until `now`, with its times counted from `origin`."""
        count, logprobs = self.count[slot], ()
        if self.params[slot].logprobs:
            logprobs = tuple(self.history_logprob[slot, :count].tolist())
        times = float(self.started[slot]) - origin, now - origin
        tokens = tuple(self.history[slot, :count].tolist())
        return Sample(tokens, reason, *times, float(self.logprob[slot]), logprobs)

    def _stopped(self, slot: int) -> bool:
        held, stops = self.history[slot, : self.count[slot]], self.params[slot].stop
        return any(len(held) >= len(stop) and np.array_equal(held[-len(stop) :], stop) for stop in stops)
