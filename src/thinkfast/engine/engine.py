"""Draws n samples of each prompt in slots that refill as samples finish."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from thinkfast.engine.backends import Backend, Memory, open_backend
from thinkfast.engine.prefill import Desk
from thinkfast.engine.sampling import DEADLINE, Sample, SamplingParams
from thinkfast.engine.slots import Rounds, SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder

Result = tuple[int, int, Sample]


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
        dropped: Collection[int] = frozenset(),
    ) -> Iterator[Result]:
        """Yields (prompt index, sample index, Sample) as samples finish.

        Sample j of every prompt is admitted before sample j + 1 of any; pairs in `skip` are left out, and of prompts
        that the caller puts into `dropped` meanwhile no further sample is admitted. A sample's tokens depend on the
        seed, its prompt and its index alone. The clock shows `clock_start` at the first prefill; once it
        shows `deadline`, running samples end with finish_reason "deadline" and no more are started. It runs on while
        the caller handles a result.
        Raises BadInput for an empty prompt, a token id outside the vocabulary, a prompt that leaves no room for
        max_tokens, or n < 1.
        """
        held = [tuple(int(token) for token in prompt) for prompt in prompts]
        self.check(held, n, params)
        return self._run(held, Rounds(len(held), n, skip, dropped), params, deadline, clock_start)

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
        if rounds.head is None:
            return
        memory = self._take_memory(max(map(len, prompts)) + params.max_tokens)
        table = SlotTable(self.slots, params, self.config.vocab_size, self.config.eos_token_ids)
        desk = Desk(memory, prompts, rounds, params.seed)
        until = math.inf if deadline is None else deadline
        origin = time.monotonic() - clock_start

        def clock() -> float:
            return time.monotonic() - origin

        try:
            while True:
                if clock() < until and desk.admit(table, clock):
                    desk.feed()
                    if clock() < until:
                        desk.admit(table, clock)
                rows = np.flatnonzero(table.active).astype(np.int32)
                now = clock()
                if now >= until:
                    for slot in rows.tolist():
                        yield _result(table, slot, DEADLINE, now)
                    return
                if len(rows):
                    finished = table.advance(rows, *memory.step(table, rows))
                    now = clock()
                    for done in finished:
                        yield _result(table, done.slot, done.reason, now)
                elif desk.done:
                    return
        finally:
            self._memory = memory

    def _take_memory(self, capacity: int) -> Memory:
        """The memory of the last call where it is large enough; a call that runs at the same time gets its own."""
        memory, self._memory = self._memory, None
        if memory is None or not self._backend.fits(memory, capacity):
            memory = self._backend.memory(self.slots, capacity)
        return memory


def _result(table: SlotTable, slot: int, reason: str, now: float) -> Result:
    prompt, index = table.pair[slot]
    started, logprob = float(table.started[slot]), float(table.logprob[slot])
    return prompt, index, Sample(table.tokens(slot), reason, started, now, logprob)
