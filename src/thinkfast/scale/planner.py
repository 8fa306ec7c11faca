"""What more samples would buy, foretold from a few: the tail of difficulty, fitted and carried on.

The chance of success of a problem is taken as Beta(a, b) over problems, so that right answers among n are
beta-binomial.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from thinkfast.errors import BadInput
from thinkfast.scale.estimate import Floats, Ints

NEW_CLASS = 0.5
"""Votes that a wrong answer never seen so far has in advance."""


def fit_beta(right: Ints, total: Ints) -> tuple[float, float]:
    """The Beta(a, b) over problems that makes right (problems,) of total (problems,) likeliest.

    A grid over mean and size, refined three times. Raises BadInput for a problem without samples.
    """
    if not len(total) or (total < 1).any():
        raise BadInput("a problem without samples: at least one sample each is needed to fit the difficulty")
    pairs, times = np.unique(np.column_stack([right, total]), axis=0, return_counts=True)
    steps = np.arange(int(total.max()))
    centre, spread = np.array([0.0, np.log(2.0)]), np.array([7.0, 6.0])
    a = b = np.ones(1)
    for _ in range(4):
        logit, size = (middle + np.linspace(-wide, wide, 15) for middle, wide in zip(centre, spread, strict=True))
        mean = 1 / (1 + np.exp(-logit))
        a, b = (np.outer(part, np.exp(size)).ravel() for part in (mean, 1 - mean))
        rising = [np.pad(np.log(x[:, None] + steps).cumsum(1), ((0, 0), (1, 0))) for x in (a, b, a + b)]
        found = rising[0][:, pairs[:, 0]] + rising[1][:, pairs[:, 1] - pairs[:, 0]] - rising[2][:, pairs[:, 1]]
        best = int(np.argmax(found @ times))
        centre, spread = np.array([logit[best // 15], size[best % 15]]), spread / 5
        a, b = a[best : best + 1], b[best : best + 1]
    return float(np.clip(a[0], 1e-3, 1e4)), float(np.clip(b[0], 1e-3, 1e4))


def plan_coverage(
    right: Ints, total: Ints, ks: Sequence[int], seed: int = 0, replicates: int = 200, confidence: float = 0.95
) -> dict[str, list[float]]:
    """Coverage with k samples a problem, foretold: {mean, low, high} over ks.

    A problem with c right of n stays without a right answer when c = 0 and k - n further samples fail, whose chance is
    B(a, b + k) / B(a, b + n). For k <= n it is pass@k under the fit. The interval is that of refits to problems drawn
    with replacement.
    """
    dice = np.random.default_rng(seed)

    def curve(c: Ints, n: Ints) -> Floats:
        a, b = fit_beta(c, n)
        longest = max(int(n.max()), max(ks))
        failing = np.concatenate([[0.0], np.log((b + np.arange(longest)) / (a + b + np.arange(longest))).cumsum()])
        further = np.exp(failing[list(ks)][None, :] - failing[n][:, None])
        later = 1 - np.where(c[:, None] > 0, 0.0, further)
        early = 1 - np.exp(failing[list(ks)])[None, :]
        chosen: Floats = np.where(np.array(ks)[None, :] >= n[:, None], later, early).mean(axis=0)
        return chosen

    rows = [curve(right[drawn], total[drawn]) for drawn in dice.integers(0, len(total), (replicates, len(total)))]
    return _summary(curve(right, total), np.array(rows), confidence)


def plan_majority(
    tallies: Sequence[Ints],
    right: Sequence[int],
    ks: Sequence[int],
    seed: int = 0,
    draws: int = 100,
    confidence: float = 0.95,
) -> dict[str, list[float]]:
    """Majority with k samples a problem, foretold: {mean, low, high} over ks.

    tallies: votes of every class of each problem, the last entry those that vote for nobody; right: which class is
    right, -1 where none was seen. The right class's share is drawn from its Beta posterior under `fit_beta`, the others
    share the rest by a Dirichlet over what was seen and one class that was not; k votes are then drawn.
    """
    dice = np.random.default_rng(seed)
    total = np.array([int(tally.sum()) for tally in tallies])
    own = np.array([int(tally[klass]) if klass >= 0 else 0 for tally, klass in zip(tallies, right, strict=True)])
    a, b = fit_beta(own, total)
    value = np.zeros((draws, len(tallies), len(ks)))
    for problem, (tally, klass) in enumerate(zip(tallies, right, strict=True)):
        rest = np.append(np.delete(tally[:-1], klass) if klass >= 0 else tally[:-1], 0) + NEW_CLASS
        silent = tally[-1] + NEW_CLASS
        chance = dice.beta(a + own[problem], b + total[problem] - own[problem], draws)
        others = dice.dirichlet(np.append(rest, silent), draws) * (1 - chance)[:, None]
        shares = np.concatenate([chance[:, None], others], axis=1)
        for column, k in enumerate(ks):
            votes = dice.multinomial(k, shares / shares.sum(axis=1, keepdims=True))[:, :-1]
            top = votes.max(axis=1)
            tied = (votes == top[:, None]).sum(axis=1)
            value[:, problem, column] = np.where((votes[:, 0] == top) & (top > 0), 1 / tied, 0.0)
    drawn = dice.integers(0, len(tallies), (draws, len(tallies)))
    rows = np.stack([value[i, drawn[i]].mean(axis=0) for i in range(draws)])
    return _summary(value.mean(axis=(0, 1)), rows, confidence)


def _summary(mean: Floats, rows: Floats, confidence: float) -> dict[str, Any]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(rows, [tail, 1 - tail], axis=0)
    return {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
