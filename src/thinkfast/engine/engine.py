"""Draws n samples of each prompt in slots that refill as samples finish."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from thinkfast.engine.backends import Backend, Memory, decode, open_backend
from thinkfast.engine.prefill import Desk
from thinkfast.engine.room import HISTORY_BYTES, Plan, kept_bytes, machine_bytes, plan
from thinkfast.engine.sampling import DEADLINE, Sample, SamplingParams
from thinkfast.engine.slots import Rounds, SlotTable
from thinkfast.engine.speculative import SpeculativeBackend
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder

Result = tuple[int, int, Sample]


class Engine:
    """Draws samples from a decoder.

    slots: samples decoded at the same time. backend: "native" (C++ on the CPU), "triton" (GPUs), "torch", or "auto",
    the first that can be had. kv_dtype: "float32", "bfloat16", or "auto": bfloat16 in the native backend, the model's
    dtype in the others.
    memory: bytes for states, keys and values, weights not counted; of the slots as many are used as fit, and prompts
    whose states do not fit are fed again. Without it, slots that exceed the machine's memory are refused.
    draft: a smaller model of the same vocabulary that guesses tokens ahead, for few slots (`speculative.py`); samples
    keep their distribution, a greedy one its tokens.
    The native backend copies the weights: make a new engine after training on.
    Raises BadInput for slots < 1, memory < 1 or an unknown name.
    """

    def __init__(
        self,
        model: Decoder,
        slots: int = 128,
        backend: str = "auto",
        kv_dtype: str = "auto",
        memory: int | None = None,
        draft: Decoder | None = None,
    ) -> None:
        if slots < 1:
            raise BadInput(f"slots is {slots}, expected 1 or more")
        if memory is not None and memory < 1:
            raise BadInput(f"memory is {memory}, expected 1 byte or more")
        self.config = model.config
        self.slots = slots
        self._budget, self._device = memory, model.embed_tokens.weight.device
        opened: Backend = open_backend(model, "torch" if draft and backend == "auto" else backend, kv_dtype)
        if draft is not None and opened.name != "torch":
            raise BadInput(f"backend is {opened.name!r}, expected 'auto' or 'torch' with a draft")
        self._backend = opened if draft is None else SpeculativeBackend(model, draft, kv_dtype)
        self._configs = [model.config] if draft is None else [model.config, draft.config]
        self._memory: Memory | None = None

    @property
    def backend(self) -> str:
        """The name of what computes: "native", "triton", "torch" or "speculative"."""
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
        max_tokens, n < 1, or what does not fit into memory.
        """
        held = [tuple(int(token) for token in prompt) for prompt in prompts]
        self.check(held, n, params)
        longest = max(map(len, held), default=0)
        room = self.plan(longest + params.max_tokens, longest)
        return self._run(held, Rounds(len(held), n, skip, dropped), params, deadline, clock_start, room)

    def plan(self, capacity: int, prompt: int, lazy: bool = False) -> Plan:
        """What fits into memory of sequences of at most `capacity` tokens behind prompts of at most `prompt`.

        lazy: count on sequences that stay shorter, where a machine takes memory only once it is touched. Raises
        BadInput where one request does not fit, or without a budget not every slot.
        """
        room = machine_bytes(self._device) if self._budget is None else self._budget
        how = {"fewer": self._budget is not None, "lazy": lazy and self._device.type == "cpu"}
        return plan(self.slots, capacity, self.slot_bytes(capacity), self.kept_bytes(prompt), room, **how)

    def kept_bytes(self, tokens: int) -> int:
        """Bytes of the state behind so many tokens."""
        return sum(kept_bytes(config, tokens, self._backend.kv_dtype) for config in self._configs)

    def slot_bytes(self, capacity: int) -> int:
        """Bytes of one slot for sequences of at most `capacity` tokens, with what it has drawn."""
        twice = self.kept_bytes(0) if len(self._configs) > 1 else 0  # speculating keeps states twice
        return self.kept_bytes(capacity) + twice + HISTORY_BYTES * capacity

    def open_memory(self, slots: int, capacity: int) -> Memory:
        """Memory of its own for `slots` sequences of at most `capacity` tokens. Raises MemoryError."""
        return self._backend.memory(slots, capacity)

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
        room: Plan,
    ) -> Iterator[Result]:
        if rounds.head is None:
            return
        memory = self._take_memory(room.slots, max(map(len, prompts)) + params.max_tokens)
        table = SlotTable(room.slots, params, self.config.vocab_size, self.config.eos_token_ids)
        desk = Desk(memory, prompts, rounds, params.seed, room.kept, self.kept_bytes)
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
                        yield *table.pair[slot], table.sample(slot, DEADLINE, now)
                    return
                if len(rows):
                    finished = decode(memory, table, rows, until - now)
                    now = clock()
                    for done in finished:
                        yield *table.pair[done.slot], table.sample(done.slot, done.reason, now)
                elif desk.done:
                    return
        finally:
            self._memory = memory

    def _take_memory(self, slots: int, capacity: int) -> Memory:
        """The memory of the last call where it serves; a call that runs at the same time gets its own."""
        memory, self._memory = self._memory, None
        if memory is not None and memory.slots == slots and self._backend.fits(memory, capacity):
            return memory
        del memory  # before the new one is made
        return self._backend.memory(slots, capacity)
