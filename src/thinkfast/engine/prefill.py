"""Prompts on their way through the model, a piece at a time, so that running samples step on in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from thinkfast.engine.backends import Kept, Memory
from thinkfast.engine.sampling import prompt_key, sample_key
from thinkfast.engine.slots import Rounds, SlotTable

CHUNK, ROUND = 256, 512
"""Tokens of a prompt, and of all prompts together, that are fed between two steps."""
AHEAD = 8


class Prefix:
    """All but the last token of a prompt, and the state behind as many of them as have been fed."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = tuple(prompt[:-1])
        self.kept: Kept | None = None

    @property
    def ready(self) -> bool:
        return self.kept is not None and self.kept.length == len(self.tokens)


def feed(memory: Memory, prefixes: Iterable[Prefix]) -> None:
    """Feeds the next piece of the first of `prefixes`, and of as many more as ROUND tokens allow.

    A prompt is cut at multiples of CHUNK whatever else is going on, so that its state never depends on that.
    """
    together: list[Prefix] = []
    pieces: list[tuple[int, ...]] = []
    total = 0
    for prefix in prefixes:
        held = 0 if prefix.kept is None else prefix.kept.length
        piece = prefix.tokens[held : held + CHUNK]
        total += len(piece)
        if together and total > ROUND:
            break
        together.append(prefix)
        pieces.append(piece)
    states = memory.prefill(pieces, [prefix.kept for prefix in together])
    for prefix, state in zip(together, states, strict=True):
        prefix.kept = state


class Desk:
    """Lets the samples of a list of prompts into free slots, in rounds.

    A prompt is fed when its first sample is next, once however many samples it has and however often it is listed, and
    its state is forgotten with the last of them.
    """

    def __init__(self, memory: Memory, prompts: Sequence[tuple[int, ...]], rounds: Rounds, seed: int) -> None:
        self._memory, self._rounds = memory, rounds
        one: dict[tuple[int, ...], Prefix] = {}
        self._of: dict[int, tuple[Prefix, int, int]] = {}  # with the last token and the key
        for index, prompt in enumerate(prompts):
            if rounds.left(index):
                self._of[index] = one.setdefault(prompt, Prefix(prompt)), prompt[-1], prompt_key(seed, prompt)
        self._ahead = deque(one.values())

    @property
    def done(self) -> bool:
        """Whether every sample has been let in."""
        return self._rounds.head is None

    def admit(self, table: SlotTable, clock: Callable[[], float]) -> bool:
        """Starts samples in free slots; returns whether a slot stays free until the next prompt has been fed."""
        for slot in np.flatnonzero(~table.active).tolist():
            if self._rounds.head is None:
                return False
            prompt, index = self._rounds.head
            prefix, last, key = self._of[prompt]
            if prefix.kept is None or not prefix.ready:
                return True
            next(self._rounds)
            self._memory.fork(prefix.kept, slot)
            table.admit(slot, (prompt, index), last, prefix.kept.length, sample_key(key, index), clock())
            if not self._rounds.left(prompt):
                del self._of[prompt]
        return False

    def feed(self) -> None:
        """Feeds a piece of the next prompt and, so that threads have work, of those that come after it."""
        while self._ahead and self._ahead[0].ready:
            self._ahead.popleft()
        if self._rounds.head is not None:
            feed(self._memory, self._in_turn(self._of[self._rounds.head[0]][0]))

    def _in_turn(self, first: Prefix) -> Iterator[Prefix]:
        yield first
        for prefix in islice(self._ahead, AHEAD):
            if prefix is not first and not prefix.ready:
                yield prefix
