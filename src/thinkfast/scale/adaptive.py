"""Spending time where it pays: a problem whose vote is decided stops, and its time goes to undecided ones.

Decided means that a lead would hold: with v votes for the first class and w for the second, the chance that the second
is really the more frequent one is the Beta tail I(1/2; v+1, w+1) (arXiv 2305.11860).
"""

import heapq
from collections import Counter
from collections.abc import Callable, Collection
from functools import lru_cache

import numpy as np

from thinkfast.errors import BadInput
from thinkfast.scale.budget import Table
from thinkfast.scale.estimate import Floats


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


def decided(votes: Collection[int], error: float, least: int = 3) -> bool:
    """Whether a vote stops: at least `least` votes, and the runner-up is ahead in truth with at most `error`."""
    if not 0 < error < 1:
        raise BadInput(f"error = {error}: expected a chance between 0 and 1")
    counts = sorted(votes, reverse=True)
    if sum(counts) < least:
        return False
    return overturn_chance(counts[0], counts[1] if len(counts) > 1 else 0) <= error


def allocate(table: Table, problems: int, seconds: Floats, error: float, slots: int, least: int = 3) -> Floats:
    """Share of the right vote per problem and budget (problems, points) when decided problems stop; replayed.

    The replay takes the measured samples of a run in rounds: `slots` at a time run side by side, each for the seconds
    that it took in the run; a problem whose vote is decided gets no further sample, the next undecided one takes its
    turn. seconds: budgets a problem, ascending. Where the undecided problems' samples run out the votes stay as they
    are. A replay cannot know that a sample would have run faster among fewer others: compare with the replay at
    error 0, which `uniform` is, not with the run itself.
    """
    return _replay(table, problems, seconds, slots, lambda votes: decided(votes, error, least))


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
