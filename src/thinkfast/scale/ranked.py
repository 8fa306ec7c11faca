"""Best of k and weighted best of k from n scored samples, and how well scores tell right from wrong.

All arguments are flat columns, a row a sample; `problem` is 0 .. problems-1. Rows may come in any order and problems
may have different numbers of samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thinkfast.errors import BadInput
from thinkfast.scale.estimate import Floats, Ints

Bools = NDArray[np.bool_]
_WORK = 1.5e7  # samples times resamples that weighted_at_k may look at


def best_at_k(
    problem: Ints, score: Floats, answered: Bools, worth: Bools | Floats, problems: int, ks: Sequence[int]
) -> Floats:
    """What the best scored of a random k-subset is worth in the mean, (problems, ks); exact.

    worth: whether a sample is right, which gives the probability that the best scored one is; or any number.

    A sample without an answer never wins; equal scores share evenly. The sample at rank r among the answered wins when
    it is drawn and none above it is: C(n-1-r, k-1) / C(n, k). Raises BadInput unless 1 <= k <= n for every problem.
    """
    total = _counts(problem, problems, ks)
    value = np.zeros((problems, len(ks)))
    rows = np.flatnonzero(answered)
    order = rows[np.lexsort((-score[rows], problem[rows]))]
    owner, ranked = problem[order], score[order]
    if not order.size:
        return value
    first = np.concatenate([[True], np.diff(owner) != 0])
    rank = np.arange(len(order)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    tie = np.cumsum(first | np.concatenate([[True], np.diff(ranked) != 0])) - 1
    size = np.bincount(tie)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total.max() + 1)))])
    below = total[owner] - 1 - rank
    for column, k in enumerate(ks):
        able = below >= k - 1
        chosen = logs[below[able]] - logs[below[able] - (k - 1)]
        all_ways = logs[total[owner[able]]] - logs[total[owner[able]] - k]
        chance = np.zeros(len(order))
        chance[able] = k * np.exp(chosen - all_ways)
        shared = (np.bincount(tie, weights=chance) / size)[tie]
        value[:, column] = np.bincount(owner, weights=shared * worth[order], minlength=problems)
    return value


def weighted_at_k(
    problem: Ints,
    weight: Floats,
    answer_class: Ints,
    correct: Bools,
    problems: int,
    ks: Sequence[int],
    seed: int = 0,
    resamples: int = 400,
) -> Floats:
    """Expected share of the weighted vote that is right over random k-subsets, (problems, ks), by resampling.

    Weights are not negative; a class has the sum of its samples' weights, the heaviest wins, ties split evenly. The
    mean over `resamples` orders of every problem's samples, fewer where there are many samples; the first k of an order
    are its k-subset. Raises BadInput as `best_at_k` does, and for a negative or not finite weight.
    """
    total = _counts(problem, problems, ks)
    unusable = ~(np.isfinite(weight) & (weight >= 0))
    if unusable.any():
        raise BadInput(f"weight {weight[unusable][0]}: expected a number that is not negative")
    order = np.argsort(problem, kind="stable")
    owner, klass, heavy, right = problem[order], answer_class[order], weight[order], correct[order]
    start = np.cumsum(total) - total
    width = int(klass.max(initial=0)) + 1
    right_class = np.zeros((problems, width))
    right_class[owner[right], klass[right]] = 1.0
    value = np.zeros((problems, len(ks)))
    rounds = int(np.clip(_WORK / max(len(owner), 1), 8, resamples))
    dice = np.random.default_rng(seed)
    steps = np.array(ks)
    for _ in range(rounds):
        drawn = np.argsort(owner + dice.random(len(owner)), kind="stable")
        place = np.arange(len(owner)) - start[owner]
        bucket = np.searchsorted(steps, place + 1)
        counts = (bucket < len(steps)) & (klass[drawn] >= 0)
        cell = (owner[counts] * len(steps) + bucket[counts]) * width + klass[drawn][counts]
        sums = np.bincount(cell, weights=heavy[drawn][counts], minlength=problems * len(steps) * width)
        running = sums.reshape(problems, len(steps), width).cumsum(axis=1)
        top = running.max(axis=2, keepdims=True)
        leads = (running >= top * (1 - 1e-12)) & (running > 0)
        value += (leads * right_class[:, None, :]).sum(axis=2) / np.maximum(leads.sum(axis=2), 1)
    return value / rounds


def soft_weights(problem: Ints, score: Floats, problems: int) -> Floats:
    """exp(score) scaled to a largest weight of 1 in every problem: votes out of log-probabilities."""
    top = np.full(problems, -np.inf)
    np.maximum.at(top, problem, score)
    weights: Floats = np.exp(score - top[problem])
    return weights


def within_auc(problem: Ints, score: Floats, correct: Bools) -> tuple[float, float]:
    """(overall, within): how often a right sample scores above a wrong one, over all pairs and over pairs of a problem.

    `within` is the mean over the problems that have both; ties count half; nan where there is no pair. Only `within`
    can help to choose among the samples of a problem: `overall` also grows by telling hard problems from easy ones.
    """
    everything = _auc(np.zeros(len(problem), dtype=np.int64), score, correct)
    inside = _auc(problem, score, correct)
    return float(everything[0]) if len(everything) else float("nan"), float(np.mean(inside)) if len(inside) else np.nan


def _auc(group: Ints, score: Floats, correct: Bools) -> Floats:
    """The area of every group that has right and wrong rows, by the ranks of the right ones."""
    if not len(group):
        return np.zeros(0)
    order = np.lexsort((score, group))
    owner, value, right = group[order], score[order], correct[order]
    first = np.concatenate([[True], np.diff(owner) != 0])
    place = np.arange(len(order)) - np.flatnonzero(first)[np.cumsum(first) - 1] + 1.0
    tie = np.cumsum(first | np.concatenate([[True], np.diff(value) != 0])) - 1
    rank: Floats = (np.bincount(tie, weights=place) / np.bincount(tie))[tie]
    good = np.bincount(owner, weights=right)
    bad = np.bincount(owner, weights=~right)
    mixed = (good > 0) & (bad > 0)
    sums = np.bincount(owner, weights=rank * right)[mixed]
    area: Floats = (sums - good[mixed] * (good[mixed] + 1) / 2) / (good[mixed] * bad[mixed])
    return area


def _counts(problem: Ints, problems: int, ks: Sequence[int]) -> Ints:
    total: Ints = np.bincount(problem, minlength=problems).astype(np.int64)
    fewest = int(total.min(initial=np.iinfo(np.int64).max))
    for k in ks:
        if not 1 <= k <= fewest:
            raise BadInput(f"k = {k}: expected 1 <= k <= n = {fewest}")
    if list(ks) != sorted(set(ks)):
        raise BadInput(f"k = {list(ks)}: expected ascending integers")
    return total
