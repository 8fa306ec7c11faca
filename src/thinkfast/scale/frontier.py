"""What the curves against time say between models: the front, where one overtakes another, speed-up and money.

Curves come as values per problem (problems, points) on one grid of seconds a problem; every interval resamples the same
problems for all models (`estimate.bootstrap_weights`).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from thinkfast.errors import BadInput
from thinkfast.scale.estimate import Floats

LEVELS = (0.25, 0.5, 0.75, 1.0)


def pareto_front(means: Mapping[str, Floats], seconds: Floats) -> list[dict[str, Any]]:
    """For every stretch of the grid the model that is highest there: {model, from_seconds, to_seconds}.

    A point belongs to the front when no model has a higher value at the same or a smaller budget; points that only
    repeat an earlier value belong to nobody.
    """
    names = list(means)
    table = np.stack([means[name] for name in names])
    leader, top = table.argmax(axis=0), table.max(axis=0)
    before = np.concatenate([[-np.inf], np.maximum.accumulate(top)[:-1]])
    front: list[dict[str, Any]] = []
    for point in np.flatnonzero(top > before):
        name, at = names[leader[point]], float(seconds[point])
        if front and front[-1]["model"] == name:
            front[-1]["to_seconds"] = at
        else:
            front.append({"model": name, "from_seconds": at, "to_seconds": at})
    return front


def crossings(
    first: Floats, second: Floats, seconds: Floats, weights: Floats, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """The budgets at which the second model overtakes the first, or falls behind it, with intervals.

    first, second: values (problems, points). Each sign change of the mean difference is told with the interval of the
    nearest change of the same direction over the replicates, on the logarithm of time, and the share of replicates that
    have one. Differences of zero count as the sign before them.
    """
    difference = second - first
    found = []
    replicates = weights @ difference
    changes = [_sign_changes(row, seconds) for row in replicates]
    for at, up in _sign_changes(difference.mean(axis=0), seconds):
        near = []
        for row in changes:
            alike = [other for other, direction in row if direction == up]
            if alike:
                near.append(min(alike, key=lambda other: abs(np.log(other / at))))
        tail = (1 - confidence) / 2
        low, high = np.quantile(near, [tail, 1 - tail]).tolist() if near else (at, at)
        share = len(near) / len(replicates)
        found.append({"seconds": at, "ahead_after": up, "low": low, "high": high, "share": share})
    return found


def _sign_changes(difference: Floats, seconds: Floats) -> list[tuple[float, bool]]:
    """(seconds, upwards) of every change of sign, interpolated on the logarithm of time."""
    live = np.flatnonzero(difference != 0)
    found = []
    for left, right in pairwise(live):
        if (difference[left] > 0) != (difference[right] > 0):
            share = difference[left] / (difference[left] - difference[right])
            log = (1 - share) * np.log(seconds[left]) + share * np.log(seconds[right])
            found.append((float(np.exp(log)), bool(difference[right] > 0)))
    return found


def time_to_reach(mean: Floats, seconds: Floats, level: float) -> float:
    """The budget at which a curve first reaches a level, interpolated on the logarithm of time; inf if it never does.

    A curve that starts above the level reaches it at the first point: no smaller budget was measured.
    """
    above = np.flatnonzero(mean >= level)
    if not above.size:
        return float("inf")
    at = int(above[0])
    if at == 0 or mean[at] == mean[at - 1]:
        return float(seconds[at])
    share = (level - mean[at - 1]) / (mean[at] - mean[at - 1])
    return float(np.exp((1 - share) * np.log(seconds[at - 1]) + share * np.log(seconds[at])))


def speedups(
    baseline: Floats, other: Floats, seconds: Floats, weights: Floats, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """At quarters of the baseline's final value: how many times sooner the other model reaches the same value.

    Values (problems, points). None in place of a number: the other model never gets there; the same in an interval's
    end when that many replicates never do.
    """
    base, mine = baseline.mean(axis=0), other.mean(axis=0)
    repeated = [(weights @ baseline), (weights @ other)]
    tail = (1 - confidence) / 2
    rows = []
    for part in LEVELS:
        level = part * float(base[-1])
        if level <= 0:
            continue
        ratio = time_to_reach(base, seconds, level) / time_to_reach(mine, seconds, level)
        ratios = []
        for a, b in zip(*repeated, strict=True):
            slow, fast = time_to_reach(a, seconds, part * float(a[-1])), time_to_reach(b, seconds, part * float(a[-1]))
            ratios.append(slow / fast)
        low, high = np.quantile(ratios, [tail, 1 - tail], method="inverted_cdf")
        rows.append({"level": level, "speedup": _known(ratio), "low": _known(float(low)), "high": _known(float(high))})
    return rows


def _known(ratio: float) -> float | None:
    return ratio if np.isfinite(ratio) and ratio > 0 else None


def dollars(seconds: Sequence[float], price_per_hour: float) -> list[float]:
    """Dollars per thousand problems at every budget. Raises BadInput unless the price is a positive number."""
    if not (np.isfinite(price_per_hour) and price_per_hour > 0):
        raise BadInput(f"price = {price_per_hour}: expected dollars per hour, above 0")
    return [1000 * value * price_per_hour / 3600 for value in seconds]
