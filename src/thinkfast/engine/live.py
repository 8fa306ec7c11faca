"""A thread that decodes for many requests at once: they share its slots by deadline, and come and go at any step.

A request below its fair share of the slots (slots / requests) is served before those above it: first those that have
had none yet, by deadline, then whoever has waited longest. What is left over goes to whoever has least. A newcomer that
finds no slot free takes its share from those above theirs: their youngest samples start anew later, with the same
tokens. A sample's tokens depend on the seed, its prompt and its index alone, as in `Engine.stream`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heapreplace

import numpy as np
from numpy.typing import NDArray

from thinkfast.engine.backends import Ahead, decode
from thinkfast.engine.engine import Engine
from thinkfast.engine.prefill import Prefix, Shelf, feed
from thinkfast.engine.request import CANCELLED, CLOSED, COMPLETE, Closed, Drawn, Event, Listener, Piece, Request
from thinkfast.engine.sampling import DEADLINE, STOP, SamplingParams, likeliest, prompt_key, sample_key
from thinkfast.engine.slots import SlotTable
from thinkfast.errors import BadInput

FLUSH_SECONDS = 0.025
SHELF_BYTES = 1 << 26  # of prompts' states between requests
PACE = 0.05  # weight of the newest step in the mean time of a step


class Ticket:
    """A submitted request: its caller may cancel it, or end one of its samples, from any thread."""

    def __init__(self, engine: LiveEngine, request: Request, listener: Listener) -> None:
        self.request, self.listener, self._engine = request, listener, engine
        self.tokens = 0
        """Tokens drawn so far, without those of samples that start anew."""
        self.deadline, self.submitted = request.deadline, time.monotonic()
        self.key = prompt_key(request.params.seed, request.prompt)
        self.prefix = Prefix(request.prompt, engine.engine.kept_bytes(len(request.prompt) - 1))
        self.new, self.closed = True, False
        self.running, self.sent = dict[int, int](), dict[int, int]()
        self.likely: dict[int, list[tuple[tuple[int, float], ...]]] = {}
        self.again, self.next, self.shortest, self.served = list[int](), 0, math.inf, 0.0

    def cancel(self) -> None:
        """Ends the request within a step, if it is still there; its running samples are dropped."""
        if not self.closed:
            self._engine.command(lambda: self._engine.close_ticket(self, CANCELLED))

    def end(self, index: int) -> None:
        """Ends sample `index` within a step, as if it had met a stop sequence."""
        self._engine.command(lambda: self._engine.end_sample(self, index))

    def unstarted(self, now: float, pace: float) -> bool:
        """Whether a sample waits for a slot and is worth one."""
        if not self.again and self.next >= self.request.n:
            return False
        late = self.request.whole and self.shortest < math.inf and now + self.shortest * pace > self.deadline
        return not late


class LiveEngine:
    """Serves requests in a thread of its own until `close`.

    capacity: tokens of a prompt and its answer together, at most. `listener`s are called in the thread and must return
    at once. Raises BadInput where a request of that capacity, or not every slot, fits into memory.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.engine, self.capacity = engine, min(capacity, engine.config.max_position_embeddings)
        self.tokens = self.dropped = 0
        """Tokens decoded, and those of them whose samples started anew."""
        self.broken: str | None = None
        config, room = engine.config, engine.plan(self.capacity, self.capacity, lazy=True)
        shelf = min(SHELF_BYTES, room.kept // 8)
        self.slots, self._room, self._shelf = room.slots, room.kept - shelf, Shelf(shelf)
        self._memory = engine.open_memory(self.slots, self.capacity)
        self._interrupt = self._memory.interrupt if isinstance(self._memory, Ahead) else lambda on: None
        self._vocab = config.vocab_size
        self._table = SlotTable(self.slots, SamplingParams(), config.vocab_size, config.eos_token_ids, self.capacity)
        self._owner: list[Ticket | None] = [None] * self.slots
        self._live: list[Ticket] = []
        self._commands, self._wake = deque[Callable[[], None]](), threading.Condition()
        self._pace, self._flushed = 0.0, 0.0
        self._stepped = math.inf  # when the step before this one ended, where nothing but work lies between
        self._told: list[tuple[Listener, Event]] = []
        self._refusing, self._settled = False, True  # settled: every prompt is fed and has had its turn
        self._thread = threading.Thread(target=self._run, name="thinkfast-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Samples being decoded now."""
        return int(self._table.active.sum())

    @property
    def requests(self) -> int:
        """Requests that have not been closed."""
        return len(self._live)

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Takes a request; everything about it is told to `listener`, `Closed` at the end.

        Raises BadInput for a prompt or parameters that cannot be served, and RuntimeError on a closed engine.
        """
        if self._refusing:
            raise RuntimeError(f"the engine is closed: {self.broken or 'closed'}")
        self.engine.check([request.prompt], request.n, request.params)
        asked = len(request.prompt) + request.params.max_tokens
        if asked > self.capacity:
            raise BadInput(
                f"prompt and max_tokens are {asked} tokens, more than the engine's capacity of {self.capacity}"
            )
        ticket = Ticket(self, request, listener)

        def enter() -> None:
            tokens = ticket.prefix.tokens
            alike = next((t.prefix for t in self._live if t.prefix.tokens == tokens), None) or self._shelf.take(tokens)
            ticket.prefix, self._settled = alike or ticket.prefix, False
            self._live.append(ticket)

        self.command(enter, at_once=not self._table.active.all())
        return ticket

    def command(self, call: Callable[[], None], at_once: bool = True) -> None:
        """Has the thread call `call` between two steps, or else behind those that are being made in a row."""
        with self._wake:
            self._commands.append(call)
            if at_once:
                self._interrupt(True)
            self._wake.notify()

    def hand_back(self, by: float = 0.0) -> None:
        """Takes no more requests and ends those there are by `by` (monotonic) at the latest, as at a deadline."""

        def shorten() -> None:
            for ticket in self._live:
                ticket.deadline = min(ticket.deadline, by)

        self._refusing = True
        self.command(shorten)

    def close(self) -> None:
        """Ends every request with reason "closed", and the thread."""
        self._refusing = True
        self.command(lambda: self._close_all(CLOSED))
        self._thread.join()

    def close_ticket(self, ticket: Ticket, reason: str) -> None:
        """In the thread: drops what runs for a ticket and says so. At a deadline the samples are handed over first."""
        if ticket not in self._live:
            return
        self._live.remove(ticket)
        ticket.closed = True
        for index, slot in list(ticket.running.items()):
            if reason == DEADLINE:
                self._tell_piece(ticket, index, slot)
                sample = self._table.sample(slot, DEADLINE, time.monotonic(), ticket.submitted)
                self._told.append((ticket.listener, Drawn(index, sample)))
            self._free(slot)
        if ticket.prefix.ready and all(t.prefix is not ticket.prefix for t in self._live):
            self._shelf.put(ticket.prefix)
        self._told.append((ticket.listener, Closed(reason)))

    def end_sample(self, ticket: Ticket, index: int) -> None:
        """In the thread: ends one sample with reason "stop", where it still runs."""
        if index in ticket.running:
            self._finish(ticket.running[index], STOP, time.monotonic())

    def _run(self) -> None:
        try:
            while self._await_work():
                self._turn()
        except Exception as error:  # noqa: BLE001 - whatever it was, those who wait must hear of it
            self.broken = f"{type(error).__name__}: {error}"
            self._refusing = True
            self._close_all(self.broken)
        self._tell()

    def _tell(self) -> None:
        """Hands over what has happened: just before a step, since who is told wants to run at once, in Python."""
        told, self._told = self._told, []
        for listener, event in told:
            listener(event)

    def _await_work(self) -> bool:
        """Sleeps until there is work, obeys the commands; False when it is over."""
        with self._wake:
            while not self._commands and not self._live:
                if self._told:
                    self._tell()  # may command something
                    continue
                if self._refusing:
                    return False
                self._stepped = math.inf
                self._wake.wait()
            commands, self._commands = self._commands, deque()
            self._interrupt(False)
        for call in commands:
            call()
        return True

    def _close_all(self, reason: str) -> None:
        for ticket in list(self._live):
            self.close_ticket(ticket, reason)

    def _turn(self) -> None:
        """One step of decoding, or several in a row, with what must be done before and after."""
        started = time.monotonic()
        self._close_due(started)
        if unfed := self._unfed():
            feed(self._memory, unfed)
            self._close_due(time.monotonic())
        self._admit()
        rows = np.flatnonzero(self._table.active).astype(np.int32)
        if not len(rows):
            self._tell()
            return
        logits, before = None, self._table.position[rows]
        if any(t.request.alternatives for t in self._live):
            logits = np.empty((len(rows), self._vocab), np.float32)
        self._tell()
        if logits is None:
            due = min(ticket.deadline for ticket in self._live)
            finished = decode(self._memory, self._table, rows, due - time.monotonic())
        else:
            tokens, logprobs = self._memory.step(self._table, rows, logits)
            self._note_likely(rows, tokens, logits)
            finished = self._table.advance(rows, tokens, logprobs)
        taken = self._table.position[rows] - before
        self.tokens += int(taken.sum())
        now = time.monotonic()
        for done in finished:
            self._finish(done.slot, done.reason, now)
        if now - self._flushed >= FLUSH_SECONDS:
            self._flushed = now
            for ticket in self._live:
                for index, slot in ticket.running.items():
                    self._tell_piece(ticket, index, slot)
        elapsed, self._stepped = (now - min(started, self._stepped)) / int(taken.max()), now
        self._pace = elapsed if self._pace == 0 else (1 - PACE) * self._pace + PACE * elapsed

    def _close_due(self, now: float) -> None:
        """Closes what has reached its deadline, and what has nothing left to do."""
        for ticket in list(self._live):
            if ticket.deadline <= now:
                self.close_ticket(ticket, DEADLINE)
            elif not ticket.running and not ticket.unstarted(now, self._pace):
                every = ticket.next >= ticket.request.n and not ticket.again
                self.close_ticket(ticket, COMPLETE if every else DEADLINE)

    def _unfed(self) -> list[Prefix]:
        """The prompts to feed, by deadline; no more are begun than there is memory for."""
        if self._settled or all(ticket.prefix.ready for ticket in self._live):
            return []
        prefixes = dict.fromkeys(t.prefix for t in sorted(self._live, key=lambda t: t.deadline))
        taken = sum(prefix.size for prefix in prefixes if prefix.kept is not None)
        unfed = []
        for prefix in prefixes:
            begins = prefix.kept is None
            if not prefix.ready and (not begins or not taken or taken + prefix.size <= self._room):
                unfed.append(prefix)
                taken += prefix.size if begins else 0
        return unfed

    def _admit(self) -> None:
        """Hands out the slots."""
        if self._settled and self._table.active.all():
            return
        ready = [ticket for ticket in self._live if ticket.prefix.ready]
        new, self._settled = [ticket for ticket in ready if ticket.new], len(ready) == len(self._live)
        free = np.flatnonzero(~self._table.active).tolist()
        if not free and not new:
            return
        now = time.monotonic()
        share = max(1, self.slots // max(1, len(self._live)))
        if free:
            waiting = [(_turn_of(t, share), at) for at, t in enumerate(ready) if t.unstarted(now, self._pace)]
            heapify(waiting)
            while free and waiting:
                at = waiting[0][1]
                self._start(ready[at], free.pop(), now)
                if ready[at].unstarted(now, self._pace):
                    heapreplace(waiting, (_turn_of(ready[at], share), at))
                else:
                    heappop(waiting)
        for ticket in sorted(new, key=lambda t: t.deadline):
            ticket.new = False
            while len(ticket.running) < share and ticket.unstarted(now, self._pace):
                slot = self._take_from_the_largest(share)
                if slot is None:
                    break
                self._start(ticket, slot, now)

    def _take_from_the_largest(self, share: int) -> int | None:
        """Frees the slot of the youngest sample of the request that has most above its share; None where there is none.

        Nobody is brought below the share by it, and no watched sample ends.
        """
        above = [t for t in self._live if len(t.running) > share and not t.request.watch]
        if not above:
            return None
        ticket = max(above, key=lambda t: len(t.running))
        index, slot = max(ticket.running.items(), key=lambda item: float(self._table.started[item[1]]))
        self.dropped += int(self._table.count[slot])
        ticket.again.append(index)
        ticket.tokens -= int(self._table.count[slot])
        self._free(slot)
        return slot

    def _start(self, ticket: Ticket, slot: int, now: float) -> None:
        if ticket.again:
            index = ticket.again.pop()
        else:
            index, ticket.next = ticket.next, ticket.next + 1
        prompt = ticket.request.prompt
        assert ticket.prefix.kept is not None
        self._memory.fork(ticket.prefix.kept, slot)
        key = sample_key(ticket.key, index)
        self._table.admit(slot, (0, index), prompt[-1], len(prompt) - 1, key, now, ticket.request.params)
        ticket.served = now
        self._owner[slot], ticket.running[index], ticket.sent[index] = ticket, slot, 0
        if ticket.request.alternatives:
            ticket.likely[index] = []

    def _free(self, slot: int) -> None:
        ticket = self._owner[slot]
        assert ticket is not None
        ticket.tokens += int(self._table.count[slot])
        index = self._table.pair[slot][1]
        self._table.active[slot], self._owner[slot] = False, None
        del ticket.running[index], ticket.sent[index]
        ticket.likely.pop(index, None)

    def _finish(self, slot: int, reason: str, now: float) -> None:
        ticket, index = self._owner[slot], self._table.pair[slot][1]
        assert ticket is not None
        self._tell_piece(ticket, index, slot)
        sample = self._table.sample(slot, reason, now, ticket.submitted)
        ticket.shortest = min(ticket.shortest, len(sample.token_ids))
        self._free(slot)
        self._told.append((ticket.listener, Drawn(index, sample)))

    def _tell_piece(self, ticket: Ticket, index: int, slot: int) -> None:
        since, until = ticket.sent[index], int(self._table.count[slot])
        if not ticket.request.watch or since >= until:
            return
        tokens = tuple(self._table.history[slot, since:until].tolist())
        logprobs = tuple(self._table.history_logprob[slot, since:until].tolist())
        ticket.sent[index] = until
        piece = Piece(index, tokens, logprobs, tuple(ticket.likely.get(index, ())[since:until]))
        self._told.append((ticket.listener, piece))

    def _note_likely(self, rows: NDArray[np.int32], tokens: NDArray[np.int32], logits: NDArray[np.float32]) -> None:
        for at, slot in enumerate(rows.tolist()):
            ticket = self._owner[slot]
            if ticket is None or not ticket.request.alternatives or tokens[at] < 0:
                continue
            ticket.likely[self._table.pair[slot][1]].append(likeliest(logits[at], ticket.request.alternatives))


def _turn_of(ticket: Ticket, share: int) -> tuple[int, float, float]:
    """Who is served first has the smallest."""
    held = len(ticket.running)
    if held >= share:
        return 2, held, ticket.deadline
    return (0, ticket.deadline, 0.0) if ticket.next == 0 else (1, ticket.served, 0.0)
