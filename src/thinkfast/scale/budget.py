"""Coverage and majority against measured time, with paired intervals and the ranges in which a model wins.

The clock of a model starts with its first prefill and runs over all problems at once. At tau seconds per problem
exactly those samples count whose t_end <= tau * problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thinkfast.errors import BadInput
from thinkfast.scale.estimate import (
    Floats,
    Ints,
    bootstrap_weights,
    majority_shares,
    pass_at_k,
    percentile_interval,
    simultaneous_band,
)
from thinkfast.scale.ranked import best_at_k, soft_weights, weighted_at_k

METRICS = ("coverage", "majority")


@dataclass(frozen=True)
class Table:
    """Graded samples of one model, a row a sample, as numpy columns of equal length.

    problem: int, 0 .. problems-1. sample_index: int. t_end: seconds on the model's clock. answer_class: int, equal
    within a problem for equal answers, -1 for an answer that votes for nobody. correct: bool, constant on a class.
    seconds: what the sample took in its slot, where known. score: its reward, where there is one; the curves then have
    best of n and weighted best of n, whose weights are exp(score).
    """

    problem: Ints
    sample_index: Ints
    t_end: Floats
    answer_class: Ints
    correct: NDArray[np.bool_]
    seconds: Floats | None = None
    score: Floats | None = None


def curves(
    tables: Mapping[str, Table],
    problems: int,
    baseline: str,
    seconds: ArrayLike,
    ks: Sequence[int],
    seed: int,
    replicates: int = 2000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The document of `curves.json`: curves by k and by time, differences from the baseline, and wins.

    seconds: ascending grid of seconds per problem. A problem without a sample is not covered and has no vote. `k` are
    those ks for which every problem has enough samples of every model; there may be none.
    All intervals share the same resampled problems; `band_*` holds simultaneously over the grid, for one model
    and metric. Raises BadInput for an unusable grid, k, table or baseline.
    """
    grid = np.asarray(seconds, dtype=np.float64)
    if grid.ndim != 1 or not grid.size or not np.isfinite(grid).all() or grid[0] <= 0 or (np.diff(grid) <= 0).any():
        raise BadInput(f"seconds = {grid.tolist()}: expected ascending positive seconds per problem")
    if list(ks) != sorted(set(ks)) or (len(ks) and ks[0] < 1):
        raise BadInput(f"k = {list(ks)}: expected ascending positive integers")
    if baseline not in tables:
        raise BadInput(f"baseline = {baseline!r}: expected one of {', '.join(tables)}")
    if not 0 < confidence < 1:
        raise BadInput(f"confidence = {confidence}: expected a number between 0 and 1")
    if problems < 1 or replicates < 1:
        raise BadInput(f"problems = {problems}, replicates = {replicates}: expected at least 1 of each")
    for name, table in tables.items():
        _check(name, table, problems)

    sizes = _enough(tables, problems, ks)
    by_k = {name: values_by_k(table, problems, sizes, seed) for name, table in tables.items()}
    by_time = {name: values_by_time(table, problems, grid) for name, table in tables.items()}
    return _document(tables, problems, baseline, grid, sizes, by_k, by_time, (seed, replicates, confidence))


def reward_curves(
    tables: Mapping[str, Table],
    problems: int,
    baseline: str,
    seconds: ArrayLike,
    ks: Sequence[int],
    seed: int,
    replicates: int = 2000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """`curves` for prompts without a right answer: one metric, `reward`, that of the best scored sample so far.

    Every table needs scores; classes and verdicts are not read. At a budget at which a prompt has no sample yet it
    counts with the lowest score of any sample of any model.
    """
    grid = np.asarray(seconds, dtype=np.float64)
    scores = {name: table.score for name, table in tables.items() if table.score is not None}
    if baseline not in tables or len(scores) < len(tables):
        raise BadInput(
            f"baseline = {baseline!r}, scores of {', '.join(scores) or 'none'}: expected all of {', '.join(tables)}"
        )
    worst = min(float(score.min()) for score in scores.values())
    sizes = _enough(tables, problems, ks)
    by_k, by_time = {}, {}
    for name, table in tables.items():
        _check(name, table, problems)
        score, everybody = scores[name], np.ones(len(table.problem), dtype=bool)
        by_k[name] = {"reward": best_at_k(table.problem, score, everybody, score, problems, sizes)}
        best = np.full((problems, len(grid) + 1), worst)
        np.maximum.at(best, (table.problem, np.searchsorted(grid * problems, table.t_end)), score)
        by_time[name] = {"reward": np.maximum.accumulate(best, axis=1)[:, :-1]}
    return _document(tables, problems, baseline, grid, sizes, by_k, by_time, (seed, replicates, confidence))


def _enough(tables: Mapping[str, Table], problems: int, ks: Sequence[int]) -> list[int]:
    """Those ks for which every problem has enough samples of every model."""
    fewest = min(int(np.bincount(table.problem, minlength=problems).min()) for table in tables.values())
    return [k for k in ks if k <= fewest]


def _document(
    tables: Mapping[str, Table],
    problems: int,
    baseline: str,
    grid: Floats,
    sizes: Sequence[int],
    by_k: Mapping[str, Mapping[str, Floats]],
    by_time: Mapping[str, Mapping[str, Floats]],
    resampling: tuple[int, int, float],
) -> dict[str, Any]:
    """The document of `curves.json` from values per problem; resampling: seed, replicates and confidence."""
    seed, replicates, confidence = resampling
    weights = bootstrap_weights(problems, replicates, seed)
    differences: dict[str, dict[str, Any]] = {}
    wins: list[dict[str, Any]] = []
    for name in (name for name in tables if name != baseline):
        differences[name] = {}
        for metric in (metric for metric in by_time[name] if metric in by_time[baseline]):
            curve = _difference(by_time[name][metric] - by_time[baseline][metric], weights, confidence)
            differences[name][metric] = {key: column.tolist() for key, column in curve.items()}
            wins += _wins(name, metric, grid, curve)
    return {
        "baseline": baseline,
        "models": list(tables),
        "problems": problems,
        "confidence": confidence,
        "replicates": replicates,
        "k": list(sizes),
        "seconds": grid.tolist(),
        "by_k": {name: _summary(values, weights, confidence) for name, values in by_k.items()},
        "by_time": {
            name: _summary(values, weights, confidence) | {"samples": _samples(tables[name], problems, grid).tolist()}
            for name, values in by_time.items()
        },
        "difference": differences,
        "wins": wins,
    }


def _check(name: str, table: Table, problems: int) -> None:
    columns = {key: column for key, column in vars(table).items() if column is not None}
    if len({np.shape(column) for column in columns.values()}) != 1 or np.ndim(table.problem) != 1:
        shapes = ", ".join(f"{key} {np.shape(column)}" for key, column in columns.items())
        raise BadInput(f"{name}: columns of equal length expected, not {shapes}")
    outside = (table.problem < 0) | (table.problem >= problems)
    if outside.any():
        raise BadInput(f"{name}: problem = {table.problem[outside][0]}: expected 0 .. {problems - 1}")
    untimed = ~(np.isfinite(table.t_end) & (table.t_end >= 0))
    if untimed.any():
        raise BadInput(f"{name}: t_end = {table.t_end[untimed][0]}: expected seconds since the first prefill")
    order = np.lexsort((table.sample_index, table.problem))
    problem, sample = table.problem[order], table.sample_index[order]
    twice = np.flatnonzero((np.diff(problem) == 0) & (np.diff(sample) == 0))
    if twice.size:
        raise BadInput(f"{name}: sample_index = {sample[twice[0]]} of problem {problem[twice[0]]} occurs twice")
    unclassed = (table.answer_class < -1) | (table.correct & (table.answer_class < 0))
    if unclassed.any():
        raise BadInput(
            f"{name}: answer_class = {table.answer_class[unclassed][0]}: expected >= 0, or -1 for a wrong answer"
        )
    order = np.lexsort((table.answer_class, table.problem))
    problem, klass, correct = table.problem[order], table.answer_class[order], table.correct[order]
    mixed = np.flatnonzero((np.diff(problem) == 0) & (np.diff(klass) == 0) & (correct[1:] != correct[:-1]))
    if mixed.size:
        raise BadInput(f"{name}: answer_class = {klass[mixed[0]]} of problem {problem[mixed[0]]} is right and wrong")


def values_by_time(table: Table, problems: int, grid: Floats) -> dict[str, Floats]:
    """Per problem and grid point (problems, points): is a counted sample right; share of the vote that is right."""
    point = np.searchsorted(grid * problems, table.t_end)
    shape = (problems, len(grid))
    covered = np.zeros(shape, dtype=bool)
    counted = point < len(grid)
    hits = counted & table.correct
    covered[table.problem[hits], point[hits]] = True

    voting = np.flatnonzero(counted & (table.answer_class >= 0))
    order = voting[np.argsort(table.t_end[voting], kind="stable")]
    problem, right = table.problem[order], table.correct[order].astype(np.float64)
    count = _running(np.ones(len(order)), problem, table.answer_class[order])
    # The leaders after a vote are the classes that reached the highest count; they reached it one after the other.
    leads = _running_max(count, problem)
    tied = _running(leads.astype(np.float64), problem, count)
    shares = _running(np.where(leads, right, 0.0), problem, count) / np.maximum(tied, 1)
    majority = np.full(shape, np.nan)
    majority[problem[leads], point[order][leads]] = shares[leads]
    values = {"coverage": np.maximum.accumulate(covered, axis=1).astype(np.float64), "majority": _carried(majority)}
    if table.score is not None:
        values |= _ranked_by_time(table, table.score, point, problems, len(grid))
    return values


def _ranked_by_time(table: Table, score: Floats, point: Ints, problems: int, points: int) -> dict[str, Floats]:
    """Best of n and weighted best of n of the samples that count, (problems, points) each."""
    rows = np.flatnonzero((point < points) & (table.answer_class >= 0))
    problem, klass, at = table.problem[rows], table.answer_class[rows], point[rows]
    width = int(klass.max(initial=0)) + 1
    right = np.zeros((problems, width))
    right[problem[table.correct[rows]], klass[table.correct[rows]]] = 1.0
    weight = np.zeros((problems, points, width))
    np.add.at(weight, (problem, at, klass), soft_weights(problem, score[rows], problems))
    weight = weight.cumsum(axis=1)
    best = np.full((problems, points, width), -np.inf)
    np.maximum.at(best, (problem, at, klass), score[rows])
    best = np.maximum.accumulate(best, axis=1)
    found = {}
    for name, value, none in (("best_of_n", best, -np.inf), ("weighted", weight, 0.0)):
        leads = (value == value.max(axis=2, keepdims=True)) & (value > none)
        found[name] = (leads * right[:, None, :]).sum(axis=2) / np.maximum(leads.sum(axis=2), 1)
    return found


def _running(values: Floats, *keys: NDArray[Any]) -> Floats:
    """Cumulative sum of values over the earlier rows with equal keys, the row itself included."""
    order = np.lexsort(keys[::-1])
    if not order.size:
        return values
    total = np.cumsum(values[order])
    first = np.concatenate([[True], np.any([np.diff(key[order]) != 0 for key in keys], axis=0)])
    before = (total - values[order])[first]
    sums = np.empty_like(total)
    sums[order] = total - before[np.cumsum(first) - 1]
    return sums


def _running_max(count: Floats, problem: Ints) -> NDArray[np.bool_]:
    """Where count equals the largest count so far in its problem; counts are below the number of rows."""
    order = np.argsort(problem, kind="stable")
    # Problems are stacked in steps higher than any count, so that one accumulation serves all of them.
    raised = problem[order] * (len(count) + 1.0) + count[order]
    leads = np.empty(len(count), dtype=bool)
    leads[order] = raised == np.maximum.accumulate(raised)
    return leads


def _carried(values: Floats) -> Floats:
    """Every NaN (rows, points) replaced by the last value before it, or 0."""
    points = np.arange(values.shape[1])
    last = np.maximum.accumulate(np.where(np.isnan(values), 0, points), axis=1)
    return np.nan_to_num(np.take_along_axis(values, last, axis=1))


def values_by_k(table: Table, problems: int, ks: Sequence[int], seed: int) -> dict[str, Floats]:
    """Per problem and k (problems, ks): pass@k and maj@k."""
    samples = np.bincount(table.problem, minlength=problems)
    right = np.bincount(table.problem[table.correct], minlength=problems)
    coverage = pass_at_k(samples[:, None], right[:, None], np.array(ks, dtype=np.int64)[None, :])

    votes = table.answer_class >= 0
    order = np.flatnonzero(votes)[np.lexsort((table.answer_class[votes], table.problem[votes]))]
    problem, klass = table.problem[order], table.answer_class[order]
    first = np.flatnonzero(np.concatenate([[True], (np.diff(problem) != 0) | (np.diff(klass) != 0)])[: len(order)])
    count = np.diff(np.append(first, len(order)))
    owner, correct = problem[first], table.correct[order][first]
    classes = np.bincount(owner, minlength=problems)
    slot = np.arange(len(owner)) - (np.cumsum(classes) - classes)[owner]
    tally = np.zeros((problems, int(classes.max(initial=0))), dtype=np.int64)
    tally[owner, slot] = count
    silent = samples - tally.sum(axis=1)

    others = tally[owner[correct]]
    others[np.arange(len(others)), slot[correct]] = 0
    majority = np.zeros((problems, len(ks)))
    np.add.at(majority, owner[correct], majority_shares(count[correct], others, silent[owner[correct]], ks, seed))
    values = {"coverage": coverage, "majority": majority}
    if table.score is not None and len(ks):
        columns = (table.answer_class >= 0, table.correct, problems, ks)
        values["best_of_n"] = best_at_k(table.problem, table.score, *columns)
        heavy = soft_weights(table.problem, table.score, problems)
        values["weighted"] = weighted_at_k(table.problem, heavy, table.answer_class, table.correct, problems, ks, seed)
    return values


def _samples(table: Table, problems: int, grid: Floats) -> Floats:
    """Mean number of counted samples per problem at every grid point."""
    return np.searchsorted(np.sort(table.t_end), grid * problems, side="right") / problems


def _summary(values: Mapping[str, Floats], weights: Floats, confidence: float) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for metric in values:
        low, high = percentile_interval(values[metric], weights, confidence)
        mean = values[metric].mean(axis=0)
        summary[metric] = {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
    return summary


def _difference(values: Floats, weights: Floats, confidence: float) -> dict[str, Floats]:
    low, high = percentile_interval(values, weights, confidence)
    band_low, band_high = simultaneous_band(values, weights, confidence)
    return {"mean": values.mean(axis=0), "low": low, "high": high, "band_low": band_low, "band_high": band_high}


def _wins(model: str, metric: str, grid: Floats, curve: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """Maximal runs of grid points with the whole band above zero, each told at its clearest point."""
    above = np.concatenate([[False], curve["band_low"] > 0, [False]])
    edges = np.flatnonzero(above[1:] != above[:-1])
    wins = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        at = start + int(np.argmax(curve["band_low"][start:end]))
        wins.append(
            {
                "model": model,
                "metric": metric,
                "from_seconds": float(grid[start]),
                "to_seconds": float(grid[end - 1]),
                "at_seconds": float(grid[at]),
                "difference": float(curve["mean"][at]),
                "low": float(curve["band_low"][at]),
                "high": float(curve["band_high"][at]),
            }
        )
    return wins
