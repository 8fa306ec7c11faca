"""Spending time where it pays: a problem whose vote is decided stops, and its time goes to undecided ones.

The rule may look after every vote: under "the leader is not the more frequent of the two" its evidence is a
non-negative supermartingale that starts at 1, so that by Ville's inequality it ever reaches 1/error with a chance of at
most `error` (betting against a fair coin with a uniform bet over 1/2..1; the one-sided form of arXiv 2101.11803). A
Beta tail below `error` (arXiv 2305.11860) would only hold for one look at a number of votes fixed in advance.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection
from fractions import Fraction
from functools import lru_cache

import numpy as np

from thinkfast.data.answers import extract_answer
from thinkfast.errors import BadInput
from thinkfast.scale.budget import Table
from thinkfast.scale.estimate import Floats
from thinkfast.scale.grade import plain_key


@lru_cache(maxsize=100_000)
def overturn_chance(first: int, second: int) -> float:
    """Chance that the class with fewer votes is the more frequent one: I(1/2; first+1, second+1), exact.

    As a binomial tail: of first + second + 1 throws of a coin at least first + 1 come up heads.
    """
    throws = first + second + 1
    # From all heads downwards, each binomial from the one before it; whole numbers, so that nothing cancels.
    ways = one = 1
    for heads in range(throws, first + 1, -1):
        one = one * heads // (throws - heads + 1)
        ways += one
    return ways / (1 << throws)


def evidence(first: int, second: int) -> float:
    """How many times likelier the votes are if the first class is the more frequent one than if both are equally so.

    2^(n+1) times the integral of p^first (1-p)^second over 1/2..1, n = first + second. At least 1/error happens with a
    chance of at most `error` when the first class is not the more frequent one, however often one looks.
    """
    n = first + second
    logs = math.lgamma(first + 1) + math.lgamma(second + 1) - math.lgamma(n + 2) + (n + 1) * math.log(2)
    return math.exp(min(logs, 700.0)) * (1 - overturn_chance(first, second))


def decided(votes: Collection[int], error: float) -> bool:
    """Whether a vote stops: the leader's `evidence` against the runner-up is at least (classes - 1) / error.

    With two classes it ever stops with the less frequent one ahead with a chance of at most `error`; with more, each
    rival seen so far has its share of it. Raises BadInput unless 0 < error < 1.
    """
    if not 0 < error < 1:
        raise BadInput(f"error = {error}: expected a chance between 0 and 1")
    counts = sorted(votes, reverse=True)
    if not counts:
        return False
    rivals = max(len(counts) - 1, 1)
    return evidence(counts[0], counts[1] if len(counts) > 1 else 0) >= rivals / error


class LiveVotes:
    """The votes of every problem while samples arrive; `over` holds the problems whose vote is decided.

    Answers that are equal only by algebra vote apart here, which can delay a stop but not the verdict given later.
    """

    def __init__(self, problems: int, error: float) -> None:
        self._votes: list[Counter[Fraction | str]] = [Counter() for _ in range(problems)]
        self._error = error
        self.over: set[int] = set()

    def count(self, problem: int, text: str) -> None:
        """Takes a completion of a problem."""
        answer = extract_answer(text)
        if answer is None:
            return
        self._votes[problem][plain_key(answer)] += 1
        if decided(self._votes[problem].values(), self._error):
            self.over.add(problem)


def allocate(table: Table, problems: int, seconds: Floats, error: float, slots: int) -> Floats:
    """Share of the right vote per problem and budget (problems, points) when decided problems stop; replayed.

    The replay takes the measured samples of a run in rounds: `slots` at a time run side by side, each for the seconds
    that it took in the run; a problem whose vote is decided gets no further sample, the next undecided one takes its
    turn. seconds: budgets a problem, ascending. Where the undecided problems' samples run out the votes stay as they
    are. A replay cannot know that a sample would have run faster among fewer others: compare with the replay at
    error 0, which `uniform` is, not with the run itself.
    """
    return _replay(table, problems, seconds, slots, lambda votes: decided(votes, error))


def uniform(table: Table, problems: int, seconds: Floats, slots: int) -> Floats:
    """`allocate` with no problem ever decided: the same samples, round by round."""
    return _replay(table, problems, seconds, slots, lambda votes: False)


def _replay(
    table: Table, problems: int, seconds: Floats, slots: int, stops: Callable[[Collection[int]], bool]
) -> Floats:
    if table.seconds is None or not np.isfinite(table.seconds).all():
        raise BadInput("the samples carry no t_start and t_end: a replay needs the seconds of each")
    queues: list[list[int]] = [[] for _ in range(problems)]
    for row in np.lexsort((table.sample_index, table.problem))[::-1]:
        queues[table.problem[row]].append(int(row))
    right: list[set[int]] = [set() for _ in range(problems)]
    for row in np.flatnonzero(table.correct):
        right[table.problem[row]].add(int(table.answer_class[row]))
    votes: list[Counter[int]] = [Counter() for _ in range(problems)]
    over = [False] * problems
    # Rounds: the problem with the fewest samples so far takes the next free slot.
    waiting = [(0, problem) for problem in range(problems)]
    running: list[tuple[float, int]] = []
    value, share = np.zeros((problems, len(seconds))), np.zeros(problems)
    limit, point, now = np.asarray(seconds) * problems, 0, 0.0
    while True:
        while waiting and len(running) < slots:
            taken, problem = heapq.heappop(waiting)
            if not over[problem] and queues[problem]:
                row = queues[problem].pop()
                heapq.heappush(running, (now + float(table.seconds[row]), row))
                heapq.heappush(waiting, (taken + 1, problem))
        if not running:
            break
        now, row = heapq.heappop(running)
        reached = int(np.searchsorted(limit, now))
        value[:, point:reached] = share[:, None]
        point = max(point, reached)
        if point == len(limit):
            break
        owner, klass = int(table.problem[row]), int(table.answer_class[row])
        if klass >= 0:
            votes[owner][klass] += 1
            top = max(votes[owner].values())
            leaders = {name for name, count in votes[owner].items() if count == top}
            share[owner] = len(right[owner] & leaders) / len(leaders)
            over[owner] = over[owner] or stops(votes[owner].values())
    value[:, point:] = share[:, None]
    return value
