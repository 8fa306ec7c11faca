"""The best answer by a deadline: chains are drawn, scored and counted until their vote is decided or must be told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from thinkfast.engine.live import CANCELLED, CLOSED, COMPLETE, Closed, Drawn, Event, Piece, Request
from thinkfast.engine.sampling import DEADLINE, SamplingParams
from thinkfast.scale.grade import Grader
from thinkfast.serve.ballot import RANKED, Ballot, Chain, Outcome, find_equal, parse_chain
from thinkfast.serve.draw import EngineClosed, Served, submit
from thinkfast.serve.judge import Judge, JudgeFailed
from thinkfast.serve.text import cut_at_stop

LARGEST = 0.25  # of a budget, that either reserve may take

Inbox = asyncio.Queue[Event | Chain | JudgeFailed | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to spend a budget. started, deadline: `time.monotonic()`. n: chains at most. judge: a reward model.
    cut: chains that the deadline cut off have a text, too."""

    problem: str
    prompt: tuple[int, ...]
    params: SamplingParams
    strategy: str
    n: int
    started: float
    deadline: float
    min_samples: int = 1
    stops: tuple[str, ...] = ()
    judge: Judge | None = None
    cut: bool = False

    @property
    def ballot(self) -> Ballot:
        """An empty one."""
        return Ballot(self.strategy, self.n, self.min_samples, self.judge is not None and self.judge.soft)


async def vote(served: Served, plan: Plan, grader: Grader) -> AsyncGenerator[Chain | Outcome, None]:
    """Yields chains as they are counted and, before the deadline, the outcome. Closing the iterator frees the slots.

    Drawing ends so long before the deadline as it has lately taken the engine to hand over what it has and the caller
    to tell an outcome, and as the reward model needs for what it has not scored. A chain that is not scored in time
    does not count, unless none is. Raises EngineClosed and JudgeFailed.
    """
    most = LARGEST * (plan.deadline - plan.started)
    latest = plan.deadline - min(most, served.tell.seconds)
    until = latest - min(most, served.hand.seconds)
    inbox: Inbox = asyncio.Queue()
    ticket = submit(served, Request(plan.prompt, plan.params, plan.n, until, whole=True), inbox)
    ballot, stopped, drawing, closed = plan.ballot, DEADLINE, True, False
    panel, classes = _Panel(plan, inbox), _Classes(ballot, grader)
    try:
        while drawing or panel.busy or not inbox.empty():
            event = await _next(inbox, latest - panel.seconds if drawing else latest)
            now = time.monotonic()
            if event is None:
                if drawing and now > until:
                    served.hand.note(now - until)
                if not drawing:
                    break
                drawing = False
                ticket.cancel()
            elif isinstance(event, JudgeFailed):
                raise event
            elif isinstance(event, Closed):
                closed = True
                if event.reason not in (COMPLETE, DEADLINE, CLOSED, CANCELLED):
                    raise EngineClosed(event.reason)
                if drawing:
                    stopped, drawing = "samples" if event.reason == COMPLETE else event.reason, False
                    if stopped == DEADLINE and now > until:
                        served.hand.note(now - until)
            elif not isinstance(event, Piece):
                chain = event if isinstance(event, Chain) else _chain(served, event, plan)
                if isinstance(event, Drawn) and panel.takes(chain):
                    continue
                ballot.add(chain)
                classes.look()
                yield chain
                if ballot.decided():
                    stopped = "decided"
                    break
        ticket.cancel()
        while not closed and (last := await _next(inbox, latest)) is not None:
            closed = isinstance(last, Closed)
        for chain in panel.left if not any(ballot.totals()) else ():
            ballot.add(chain)
            classes.look()
            yield chain
        if plan.strategy != "best_of_n":
            await classes.settle(latest)
        yield replace(ballot.outcome(time.monotonic() - plan.started, stopped), tokens=ticket.tokens)
    finally:
        ticket.cancel()
        panel.close()
        classes.close()


class _Panel:
    """Chains on their way through the reward model; they come back into the inbox with their score."""

    def __init__(self, plan: Plan, inbox: Inbox) -> None:
        self._judge = plan.judge if plan.strategy in RANKED else None
        self._problem, self._inbox = plan.problem, inbox
        self._task: asyncio.Task[None] | None = None
        self._longest = ""
        self.left: list[Chain] = []

    def takes(self, chain: Chain) -> bool:
        """Whether this chain is scored; then it has been taken."""
        if self._judge is None or chain.answer is None:
            return False
        self.left.append(chain)
        self._longest = max(self._longest, chain.text, key=len)
        if not self.busy:
            self._task = asyncio.create_task(self._work(self._judge))
        return True

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def seconds(self) -> float:
        """Until everything taken is scored, and one more that is as long as the longest."""
        if self._judge is None:
            return 0.0
        return self._judge.seconds(self._problem, [*(chain.text for chain in self.left), self._longest])

    async def _work(self, judge: Judge) -> None:
        while self.left:
            together = self.left[: judge.batch(self._problem, [chain.text for chain in self.left])]
            try:
                scores = await judge.scores(self._problem, [chain.text for chain in together])
            except JudgeFailed as error:
                self._inbox.put_nowait(error)
                return
            del self.left[: len(together)]
            for chain, score in zip(together, scores, strict=True):
                self._inbox.put_nowait(replace(chain, score=score))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()


class _Classes:
    """Finds the classes of answers that are no plain numbers, one after the other, beside everything else."""

    def __init__(self, ballot: Ballot, grader: Grader) -> None:
        self._ballot, self._grader = ballot, grader
        self._task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Starts on what has no class."""
        if self._ballot.unplaced and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._place())

    async def _place(self) -> None:
        ballot = self._ballot
        while ballot.unplaced:
            answer = ballot.unplaced[0]
            equal = await asyncio.to_thread(find_equal, self._grader, list(ballot.representatives), answer)
            ballot.place(answer, equal)

    async def settle(self, latest: float) -> None:
        """Waits until every answer has its class, but not beyond `latest`."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=max(0.0, latest - time.monotonic()))

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()


async def _next(inbox: Inbox, moment: float) -> Event | Chain | JudgeFailed | None:
    """What comes next, None where nothing has come by a moment of `time.monotonic()`."""
    loop, event = asyncio.get_running_loop(), None
    while event is None:  # may be left by an earlier alarm
        if not inbox.empty():
            event = inbox.get_nowait()
        elif time.monotonic() >= moment:
            return None
        else:
            alarm = loop.call_at(loop.time() + moment - time.monotonic(), inbox.put_nowait, None)
            try:
                event = await inbox.get()
            finally:
                alarm.cancel()
    return event


def _chain(served: Served, drawn: Drawn, plan: Plan) -> Chain:
    sample = drawn.sample
    wanted = plan.cut or sample.finish_reason != DEADLINE or plan.stops
    text, stopped = cut_at_stop(served.tokenizer.decode(list(sample.token_ids)) if wanted else "", plan.stops)
    reason = "stop" if stopped else sample.finish_reason
    seconds = time.monotonic() - plan.started
    return parse_chain(drawn.index, text, len(sample.token_ids), seconds, reason, sample.logprob_sum)
