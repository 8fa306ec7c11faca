"""Prompts on their way through the model, a piece at a time, so that running samples step on in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np

from thinkfast.engine.backends import Kept, Memory
from thinkfast.engine.sampling import prompt_key, sample_key
from thinkfast.engine.slots import Rounds, SlotTable

CHUNK, ROUND = 256, 512
"""Tokens of a prompt, and of all prompts together, that are fed between two steps."""
AHEAD = 8


class Prefix:
    """All but the last token of a prompt, and the state behind as many of them as have been fed.

    size: bytes of the state behind all of them.
    """

    def __init__(self, prompt: Sequence[int], size: int = 0) -> None:
        self.tokens, self.size = tuple(prompt[:-1]), size
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


class Shelf:
    """States of prompts that nobody waits for any more, up to `limit` bytes, for whoever asks the same next."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._held: dict[tuple[int, ...], Prefix] = {}  # the one used last at the end

    def take(self, tokens: tuple[int, ...]) -> Prefix | None:
        """The state behind these tokens, which leaves the shelf."""
        prefix = self._held.pop(tokens, None)
        self._bytes -= 0 if prefix is None else prefix.size
        return prefix

    def put(self, prefix: Prefix) -> None:
        """Keeps a state that has been fed whole, if it fits at all; those used longest ago make room for it."""
        if prefix.size > self._limit:
            return
        self.take(prefix.tokens)
        self._held[prefix.tokens], self._bytes = prefix, self._bytes + prefix.size
        while self._bytes > self._limit:
            self.take(next(iter(self._held)))


class Desk:
    """Lets the samples of a list of prompts into free slots, in rounds.

    A prompt is fed when its first sample is next, once however many samples it has and however often it is listed, and
    its state is forgotten with the last of them. Where the states would take more than `limit` bytes, by `size` of
    their tokens, the one whose turn is furthest away is forgotten before, and fed again for it.
    """

    def __init__(
        self,
        memory: Memory,
        prompts: Sequence[tuple[int, ...]],
        rounds: Rounds,
        seed: int,
        limit: int,
        size: Callable[[int], int],
    ) -> None:
        self._memory, self._rounds, self._limit = memory, rounds, limit
        one: dict[tuple[int, ...], Prefix] = {}
        self._of: dict[int, tuple[Prefix, int, int]] = {}  # with the last token and the key
        for index, prompt in enumerate(prompts):
            if rounds.left(index):
                if prompt not in one:
                    one[prompt] = Prefix(prompt, size(len(prompt) - 1))
                self._of[index] = one[prompt], prompt[-1], prompt_key(seed, prompt)
        self._ahead = deque(one.values())
        self._used: dict[Prefix, None] = {}  # kept for later rounds, the one used last at the end

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
            self._used.pop(prefix, None)
            if self._rounds.left(prompt):
                self._used[prefix] = None
            else:
                del self._of[prompt]
        return False

    def feed(self) -> None:
        """Feeds a piece of the next prompt and, so that threads have work, of those that come after it."""
        if self._rounds.head is None:
            return
        first = self._of[self._rounds.head[0]][0]
        while self._ahead and self._ahead[0].ready:
            self._ahead.popleft()
        together, taken = [first], 2 * first.size  # fed and kept
        for prefix in islice(self._ahead, AHEAD):
            if prefix is not first and taken + prefix.size <= self._limit:
                taken += prefix.size
                together += [] if prefix.ready else [prefix]
        taken += sum(prefix.size for prefix in self._used)
        while self._used and taken > self._limit:
            forgotten, _ = self._used.popitem()
            forgotten.kept, taken = None, taken - forgotten.size
        feed(self._memory, together)
