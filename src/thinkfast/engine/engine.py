"""Draws n samples of each prompt in slots that refill as samples finish."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from thinkfast.engine.backends import Backend, Kept, Memory, open_backend
from thinkfast.engine.sampling import DEADLINE, Sample, SamplingParams, prompt_key, sample_key
from thinkfast.engine.slots import Rounds, SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder

Result = tuple[int, int, Sample]
PREFILL_AHEAD = 8


class Engine:
    """Draws samples from a decoder.

    slots: samples decoded at the same time. backend: "native" (C++ on the CPU), "torch", or "auto", the first that can
    be had. kv_dtype: "float32", "bfloat16", or "auto": bfloat16 in the native backend, the model's dtype in torch.
    The native backend copies the weights: make a new engine after training on.
    Raises BadInput for slots < 1 or an unknown name.
    """

    def __init__(self, model: Decoder, slots: int = 128, backend: str = "auto", kv_dtype: str = "auto") -> None:
        if slots < 1:
            raise BadInput(f"slots is {slots}, expected 1 or more")
        self.config = model.config
        self.slots = slots
        self._backend: Backend = open_backend(model, backend, kv_dtype)
        self._memory: Memory | None = None

    @property
    def backend(self) -> str:
        """The name of what computes: "native" or "torch"."""
        return self._backend.name

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, params: SamplingParams, deadline: float | None = None
    ) -> list[list[Sample]]:
        """The n samples of each prompt, in order.

        deadline: seconds from the first prefill. At the deadline running samples end as they are and those not yet
        started come back empty, both with finish_reason "deadline". Raises BadInput as `stream` does.
        """
        results: list[list[Sample | None]] = [[None] * max(n, 0) for _ in prompts]
        last = 0.0
        for prompt, index, sample in self.stream(prompts, n, params, deadline):
            results[prompt][index] = sample
            last = max(last, sample.t_end)
        absent = Sample((), DEADLINE, last, last, 0.0)
        return [[sample or absent for sample in row] for row in results]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        deadline: float | None = None,
        skip: Collection[tuple[int, int]] = frozenset(),
        clock_start: float = 0.0,
    ) -> Iterator[Result]:
        """Yields (prompt index, sample index, Sample) as samples finish.

        Sample j of every prompt is admitted before sample j + 1 of any; pairs in `skip` are left out. A sample's tokens
        depend on the seed, its prompt and its index alone. The clock shows `clock_start` at the first prefill; once it
        shows `deadline`, running samples end with finish_reason "deadline" and no more are started. It runs on while
        the caller handles a result.
        Raises BadInput for an empty prompt, a token id outside the vocabulary, a prompt that leaves no room for
        max_tokens, or n < 1.
        """
        held = [tuple(int(token) for token in prompt) for prompt in prompts]
        self.check(held, n, params)
        return self._run(held, Rounds(len(held), n, skip), params, deadline, clock_start)

    def open_memory(self, capacity: int) -> Memory:
        """Memory of its own for `slots` sequences of at most `capacity` tokens. Raises MemoryError."""
        return self._backend.memory(self.slots, capacity)

    def check(self, prompts: Sequence[Sequence[int]], n: int, params: SamplingParams) -> None:
        """Raises BadInput as `stream` does."""
        if n < 1:
            raise BadInput(f"n is {n}, expected 1 or more")
        vocab, limit = self.config.vocab_size, self.config.max_position_embeddings
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise BadInput(f"prompt {index} is empty, expected one or more token ids")
            bad = next((token for token in prompt if not 0 <= token < vocab), None)
            if bad is not None:
                raise BadInput(f"prompt {index} holds token id {bad}, expected 0 to {vocab - 1}")
            if len(prompt) + params.max_tokens > limit:
                raise BadInput(
                    f"prompt {index} has {len(prompt)} tokens and max_tokens is {params.max_tokens}: "
                    f"together more than max_position_embeddings {limit}"
                )

    def _run(
        self,
        prompts: list[tuple[int, ...]],
        rounds: Rounds,
        params: SamplingParams,
        deadline: float | None,
        clock_start: float,
    ) -> Iterator[Result]:
        if rounds.exhausted:
            return
        memory = self._take_memory(max(map(len, prompts)) + params.max_tokens)
        table = SlotTable(self.slots, params, self.config.vocab_size, self.config.eos_token_ids)
        prefixes = _Prefixes(memory, prompts, rounds, params.seed)
        until = math.inf if deadline is None else deadline
        origin = time.monotonic() - clock_start
        try:
            while True:
                for slot in np.flatnonzero(~table.active).tolist():
                    now = time.monotonic() - origin
                    pair = next(rounds, None) if now < until else None
                    if pair is None:
                        break
                    prefixes.start(table, slot, pair, now)
                now = time.monotonic() - origin
                rows = np.flatnonzero(table.active).astype(np.int32)
                if not len(rows):
                    return
                if now >= until:
                    for slot in rows.tolist():
                        yield _result(table, slot, DEADLINE, now)
                    return
                finished = table.advance(rows, *memory.step(table, rows))
                now = time.monotonic() - origin
                for done in finished:
                    yield _result(table, done.slot, done.reason, now)
        finally:
            self._memory = memory

    def _take_memory(self, capacity: int) -> Memory:
        """The memory of the last call where it is large enough; a call that runs at the same time gets its own."""
        memory, self._memory = self._memory, None
        if memory is None or not self._backend.fits(memory, capacity):
            memory = self._backend.memory(self.slots, capacity)
        return memory


class _Prefixes:
    """The states behind all but the last token of each prompt, from the first need of it to its last sample."""

    def __init__(self, memory: Memory, prompts: list[tuple[int, ...]], rounds: Rounds, seed: int) -> None:
        self._memory, self._prompts, self._rounds, self._seed = memory, prompts, rounds, seed
        self._kept: dict[int, tuple[Kept, int]] = {}
        self._waiting = deque(index for index in range(len(prompts)) if rounds.left(index))

    def start(self, table: SlotTable, slot: int, pair: tuple[int, int], now: float) -> None:
        """Puts a sample into a slot."""
        prompt = self._prompts[pair[0]]
        if pair[0] not in self._kept:
            self._prefill(pair[0])
        kept, key = self._kept[pair[0]]
        self._memory.fork(kept, slot)
        table.admit(slot, pair, prompt[-1], len(prompt) - 1, sample_key(key, pair[1]), now)
        if not self._rounds.left(pair[0]):
            del self._kept[pair[0]]

    def _prefill(self, needed: int) -> None:
        """Computes a prompt and, so that threads have work, those that come next."""
        together = [needed]
        self._waiting.remove(needed)
        while self._waiting and len(together) < PREFILL_AHEAD:
            together.append(self._waiting.popleft())
        states = self._memory.prefill([self._prompts[index][:-1] for index in together])
        for index, state in zip(together, states, strict=True):
            self._kept[index] = (state, prompt_key(self._seed, self._prompts[index]))


def _result(table: SlotTable, slot: int, reason: str, now: float) -> Result:
    prompt, index = table.pair[slot]
    started, logprob = float(table.started[slot]), float(table.logprob[slot])
    return prompt, index, Sample(table.tokens(slot), reason, started, now, logprob)
