"""Where time pays: fronts and crossings of compared models, adaptive against uniform sampling, and the planner."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast import records
from thinkfast.errors import BadInput
from thinkfast.recipe import Compare
from thinkfast.records import ScoreRow
from thinkfast.results import Graded, compare_tables, curves_in_words, read_source, read_texts, source_name, table

if TYPE_CHECKING:
    from thinkfast.scale.budget import Table
    from thinkfast.scale.estimate import Ints

COUNTED = ("grading", "rewards")


def read_tables(
    sources: Sequence[Path],
    problems_file: Path | None,
    rewards: Sequence[Path] = (),
    counted: Collection[str] = (),
) -> tuple[dict[str, Table], int]:
    """The graded samples of every source, by its name, and the number of problems.

    rewards: none, or a directory of rewards for each source. counted: see `results.table`. Raises BadInput for
    other problems than those of the first source, two sources of one name, and samples without a reward.
    """
    if rewards and len(rewards) != len(sources):
        raise BadInput(f"{len(rewards)} directories of rewards for {len(sources)} sources: expected one each")
    tables: dict[str, Table] = {}
    first: list[tuple[str, str]] = []
    for place, source in enumerate(sources):
        problems, graded = read_source(source, problems_file)
        asked = [(problem.id, problem.answer) for problem in problems]
        first = first or asked
        if asked != first:
            raise BadInput(f"{source}: its problems are not those of {sources[0]}")
        name = source_name(source)
        if name in tables:
            raise BadInput(f"{source}: two sources are called {name!r}")
        if rewards:
            graded = _rewarded(graded, rewards[place], source)
        tables[name] = table(graded, problems, counted)
    return tables, len(first)


def frontier(
    tables: Mapping[str, Table], problems: int, settings: Compare, price_per_hour: float | None = None
) -> dict[str, Any]:
    """For coverage and majority (and best of n where there are rewards): the front, the `crossings` of every pair of
    models, and the `speedups` of the others over the baseline. With a price also `dollars`, per thousand problems, at
    every budget.
    """
    import numpy as np

    from thinkfast.scale.budget import values_by_time
    from thinkfast.scale.estimate import bootstrap_weights
    from thinkfast.scale.frontier import crossings, dollars, pareto_front, speedups

    seconds = np.array(settings.grid.seconds)
    weights = bootstrap_weights(problems, settings.replicates, settings.seed)
    values = {name: values_by_time(one, problems, seconds) for name, one in tables.items()}
    metrics = [metric for metric in values[settings.baseline] if all(metric in row for row in values.values())]
    document: dict[str, Any] = {"seconds": seconds.tolist(), "baseline": settings.baseline, "metrics": {}}
    for metric in metrics:
        base = values[settings.baseline][metric]
        others = {name: row[metric] for name, row in values.items() if name != settings.baseline}
        pairs = combinations([settings.baseline, *others], 2)
        document["metrics"][metric] = {
            "front": pareto_front({name: row[metric].mean(axis=0) for name, row in values.items()}, seconds),
            "crossings": [
                {"model": second, "over": first, **row}
                for first, second in pairs
                for row in crossings(values[first][metric], values[second][metric], seconds, weights)
            ],
            "speedups": {name: speedups(base, row, seconds, weights) for name, row in others.items()},
        }
    if price_per_hour is not None:
        document["dollars"] = dollars(seconds.tolist(), price_per_hour)
    return document


def adapt(tables: Mapping[str, Table], problems: int, settings: Compare, error: float, slots: int) -> dict[str, Any]:
    """Majority against time when decided problems stop, beside uniform sampling, replayed from measured samples.

    For every model both curves and their paired difference with its simultaneous band.
    """
    import numpy as np

    from thinkfast.scale.adaptive import allocate, uniform
    from thinkfast.scale.estimate import bootstrap_weights, simultaneous_band

    seconds = np.array(settings.grid.seconds)
    weights = bootstrap_weights(problems, settings.replicates, settings.seed)
    document: dict[str, Any] = {"seconds": seconds.tolist(), "error": error, "slots": slots, "models": {}}
    for name, one in tables.items():
        spent, even = allocate(one, problems, seconds, error, slots), uniform(one, problems, seconds, slots)
        low, high = simultaneous_band(spent - even, weights, 0.95)
        document["models"][name] = {
            "adaptive": spent.mean(axis=0).tolist(),
            "uniform": even.mean(axis=0).tolist(),
            "difference": {
                "mean": (spent - even).mean(axis=0).tolist(),
                "band_low": low.tolist(),
                "band_high": high.tolist(),
            },
        }
    return document


def plan(tables: Mapping[str, Table], problems: int, settings: Compare, pilot: int) -> dict[str, Any]:
    """Coverage and majority foretold from the first `pilot` samples of each problem, for every model: against k, and at
    every budget with the k that it buys at the pilot's rate, and the best model and strategy there.

    `observed` is what the samples behind the pilot say, which the fit has not seen, at every k they are enough for;
    `score` is the mean distance between the two and the share of intervals that hold the observed value.
    """
    import numpy as np

    from thinkfast.scale.planner import plan_coverage, plan_majority

    document: dict[str, Any] = {"pilot": pilot, "k": list(settings.ks), "models": {}}
    grid = settings.grid.seconds
    for name, one in tables.items():
        fewest = int(np.bincount(one.problem, minlength=problems).min())
        if not 1 <= pilot <= fewest:
            raise BadInput(f"{name}: pilot = {pilot}: expected 1 to {fewest}, the fewest samples of a problem")
        early = one.sample_index < pilot
        tallies, right = _tallies(one, early, problems)
        counts = np.bincount(one.problem[early], minlength=problems)
        good = np.bincount(one.problem[early & one.correct], minlength=problems)
        rate = float(one.t_end[early].max()) / max(int(early.sum()), 1)
        bought = [int(seconds / rate) for seconds in grid]
        asked = sorted({*settings.ks, *(k for k in bought if k)})
        told = {
            "coverage": plan_coverage(good, counts, asked, settings.seed),
            "majority": plan_majority(tallies, right, asked, settings.seed),
        }
        place = {k: index for index, k in enumerate(asked)}
        document["models"][name] = {
            "seconds": [k * rate for k in settings.ks],
            **{metric: _at(row, [place[k] for k in settings.ks]) for metric, row in told.items()},
            "budgets": [
                {"seconds": seconds, "k": k} | {metric: _at(row, [place[k]]) for metric, row in told.items()}
                for seconds, k in zip(grid, bought, strict=True)
                if k
            ],
            **_scored(one, ~early, problems, asked, told, settings.seed),
        }
    document["best"] = _best(document["models"], grid)
    return document


def _at(row: Mapping[str, Sequence[float]], places: Sequence[int]) -> dict[str, list[float]]:
    return {key: [values[place] for place in places] for key, values in row.items()}


def _scored(
    one: Table,
    later: Any,
    problems: int,
    ks: Sequence[int],
    told: Mapping[str, Mapping[str, Sequence[float]]],
    seed: int,
) -> dict[str, Any]:
    """What the samples of `later` say at the ks that they are enough for, and how far what was told is from it."""
    import numpy as np

    from thinkfast.scale.budget import Table, values_by_k

    columns = (one.problem, one.sample_index, one.t_end, one.answer_class, one.correct)
    unseen = Table(*(column[later] for column in columns))
    fewest = int(np.bincount(unseen.problem, minlength=problems).min())
    known = [k for k in ks if k <= fewest]
    if not known:
        return {"observed": {"k": []}, "score": {}}
    seen = {metric: row.mean(axis=0) for metric, row in values_by_k(unseen, problems, known, seed).items()}
    score = {}
    for metric, row in told.items():
        mean, low, high = (np.array(row[key][: len(known)]) for key in ("mean", "low", "high"))
        inside = (low <= seen[metric]) & (seen[metric] <= high)
        score[metric] = {"error": float(np.abs(mean - seen[metric]).mean()), "inside": float(inside.mean())}
    return {"observed": {"k": known} | {metric: seen[metric].tolist() for metric in told}, "score": score}


def _best(models: Mapping[str, Any], grid: Sequence[float]) -> list[dict[str, Any]]:
    """At every budget the model whose vote, and the one whose coverage, is foretold to be highest."""
    rows = []
    for seconds in grid:
        there = {
            name: next((r for r in row["budgets"] if r["seconds"] == seconds), None) for name, row in models.items()
        }
        able = {name: row for name, row in there.items() if row}
        if able:
            row: dict[str, Any] = {"seconds": seconds}
            for metric in ("coverage", "majority"):
                name = max(able, key=lambda one: able[one][metric]["mean"][0])
                row[metric] = {"model": name, "k": able[name]["k"], **{k: v[0] for k, v in able[name][metric].items()}}
            rows.append(row)
    return rows


def _tallies(one: Table, rows: Any, problems: int) -> tuple[list[Ints], list[int]]:
    """Votes a class of every problem with the silent ones last, and which of them is right (-1: not seen)."""
    import numpy as np

    tallies, right = [], []
    for problem in range(problems):
        mine = rows & (one.problem == problem)
        voting = mine & (one.answer_class >= 0)
        names, counts = np.unique(one.answer_class[voting], return_counts=True)
        good = set(one.answer_class[mine & one.correct].tolist())
        right.append(next((place for place, klass in enumerate(names.tolist()) if klass in good), -1))
        tallies.append(np.append(counts, int((mine & (one.answer_class < 0)).sum())))
    return tallies, right


def compare_sources(
    sources: Sequence[Path],
    problems_file: Path | None,
    settings: Compare,
    out: Path | None,
    rewards: Sequence[Path] = (),
    price_per_hour: float | None = None,
    counted: Collection[str] = (),
) -> dict[str, Any]:
    """The curves of several sources over the same problems and, where all are timed, their `frontier`.

    counted: "grading" and "rewards", whose seconds are then in the clock.
    """
    _check_counted(counted, rewards)
    tables, problems = read_tables(sources, problems_file, rewards, counted)
    document = compare_tables(tables, problems, settings) | {"in_the_clock": ["sampling", *counted]}
    if all(one.seconds is not None for one in tables.values()):
        document["frontier"] = frontier(tables, problems, settings, price_per_hour)
    return _stored(document, out)


def compare_rewards(
    sources: Sequence[Path],
    problems_file: Path | None,
    settings: Compare,
    out: Path | None,
    rewards: Sequence[Path],
    price_per_hour: float | None = None,
    counted: Collection[str] = (),
) -> dict[str, Any]:
    """The best reward so far against samples and time, of several sources on prompts that have no right answer.

    Raises BadInput as `compare_sources` does, without rewards, and for samples without times.
    """
    from thinkfast.scale.budget import reward_curves
    from thinkfast.scale.frontier import dollars

    _check_counted([name for name in counted if name != "rewards"], rewards)
    if len(rewards) != len(sources):
        raise BadInput(f"{len(rewards)} directories of rewards for {len(sources)} sources: expected one each")
    tables: dict[str, Table] = {}
    first: list[str] = []
    for source, place in zip(sources, rewards, strict=True):
        problems, samples, timed = read_texts(source, problems_file, answers=False)
        if not timed:
            raise BadInput(f"{source}: the samples carry no t_end, expected seconds")
        first = first or [problem.id for problem in problems]
        if [problem.id for problem in problems] != first:
            raise BadInput(f"{source}: its problems are not those of {sources[0]}")
        silent = [ScoreRow(row.problem_id, row.sample_index, None, -1, False) for row in samples]
        tables[source_name(source)] = table(_rewarded(Graded(samples, silent), place, source), problems, counted)
    if len(tables) < len(sources):
        raise BadInput(f"{', '.join(map(str, sources))}: two sources have one name")
    document = reward_curves(
        tables, len(first), settings.baseline, settings.grid.seconds, settings.ks, settings.seed, settings.replicates
    )
    document["in_the_clock"] = ["sampling", *counted]
    if price_per_hour is not None:
        document["dollars"] = dollars(settings.grid.seconds, price_per_hour)
    return _stored(document, out)


def _rewarded(graded: Graded, rewards: Path, source: Path) -> Graded:
    """With the rewards of a directory. Raises BadInput for a sample that has none there."""
    held = {(row.problem_id, row.sample_index): row for row in records.read_rewards(rewards)}
    lacking = next((r for r in graded.samples if (r.problem_id, r.sample_index) not in held), None)
    if lacking is not None:
        sample = f"sample {lacking.sample_index} of problem {lacking.problem_id}"
        raise BadInput(f"{rewards}: no reward for {sample} of {source}")
    return replace(graded, rewards=held)


def _check_counted(counted: Collection[str], rewards: Sequence[Path]) -> None:
    unknown = next((name for name in counted if name not in COUNTED), None)
    if unknown is not None:
        raise BadInput(f"count {unknown!r}: expected {' or '.join(COUNTED)}")
    if "rewards" in counted and not rewards:
        raise BadInput("count 'rewards': --rewards is needed")


def adapt_sources(
    sources: Sequence[Path],
    problems_file: Path | None,
    span: tuple[float, float],
    error: float,
    slots: int,
    out: Path | None,
) -> dict[str, Any]:
    """`adapt` of several sources, stored in `out` where given."""
    from thinkfast.recipe import section

    tables, problems = read_tables(sources, problems_file)
    settings = section(Compare, {"grid": {"first": span[0], "last": span[1], "points": 25}})
    return _stored(adapt(tables, problems, settings, error, slots), out)


def plan_sources(
    sources: Sequence[Path], problems_file: Path | None, settings: Compare, pilot: int, out: Path | None
) -> dict[str, Any]:
    """`plan` of several sources, stored in `out` where given."""
    tables, problems = read_tables(sources, problems_file)
    return _stored(plan(tables, problems, settings, pilot), out)


def _stored(document: dict[str, Any], out: Path | None) -> dict[str, Any]:
    if out is not None:
        records.write_json(out, document)
    return document


def in_words(document: Mapping[str, Any]) -> list[str]:
    """The curves in words, then who leads where and who overtakes whom."""
    lines = curves_in_words(document)
    for metric, found in document.get("frontier", {}).get("metrics", {}).items():
        for part in found["front"]:
            span = f"{part['from_seconds']:.3g} to {part['to_seconds']:.3g} s a problem"
            lines.append(f"{metric}: {part['model']} leads from {span}")
        for row in found["crossings"]:
            verb = "overtakes" if row["ahead_after"] else "falls behind"
            place = f"{row['seconds']:.3g} s [{row['low']:.3g}, {row['high']:.3g}]"
            lines.append(f"{metric}: {row['model']} {verb} {row['over']} at {place}")
        for name, rows in found["speedups"].items():
            for row in rows:
                sure = "-" if row["low"] is None else f"{row['low']:.2f}"
                far = "-" if row["high"] is None else f"{row['high']:.2f}"
                times = "never" if row["speedup"] is None else f"{row['speedup']:.2f} times as fast [{sure}, {far}]"
                lines.append(f"{metric} {row['level']:.3f}: {name} {times}")
    return lines


def adapted_in_words(document: Mapping[str, Any]) -> list[str]:
    """For every model the budget at which stopping decided votes gains most."""
    lines = []
    for name, row in document["models"].items():
        gain = row["difference"]
        at = max(range(len(gain["mean"])), key=gain["mean"].__getitem__)
        band = f"[{gain['band_low'][at]:+.3f}, {gain['band_high'][at]:+.3f}]"
        values = f"{row['adaptive'][at]:.3f} against {row['uniform'][at]:.3f}"
        lines.append(f"{name}: {values} at {document['seconds'][at]:.3g} s a problem: {gain['mean'][at]:+.3f} {band}")
    return lines


def planned_in_words(document: Mapping[str, Any]) -> list[str]:
    """A line for every model, metric and k: foretold with its interval, and observed where there are unseen samples;
    then how good that was, and what to run at which budget."""
    lines = []
    for name, row in document["models"].items():
        for metric in ("coverage", "majority"):
            for place, k in enumerate(document["k"]):
                told = row[metric]
                band = f"{told['mean'][place]:.3f} [{told['low'][place]:.3f}, {told['high'][place]:.3f}]"
                known = row["observed"]["k"]
                seen = f", observed {row['observed'][metric][known.index(k)]:.3f}" if k in known else ""
                lines.append(f"{name:<12} k {k:>4}  {metric} {band}{seen}")
            if row["score"]:
                score = row["score"][metric]
                lines.append(
                    f"{name:<12} {metric}: {score['error']:.3f} from unseen samples in the mean over k = 1.."
                    f"{row['observed']['k'][-1]}, {score['inside']:.0%} of them inside the interval"
                )
    for metric in ("coverage", "majority"):
        last = None
        for row in document["best"]:
            best = row[metric]
            if best["model"] != last:
                told = f"{best['mean']:.3f} [{best['low']:.3f}, {best['high']:.3f}]"
                lines.append(f"{metric}: from {row['seconds']:.3g} s a problem {best['model']}, k {best['k']}: {told}")
            last = best["model"]
    return lines
