"""What the figures say, in sentences built from the numbers and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from thinkfast.report.figures import common_batch
from thinkfast.report.load import METRICS, Run, Win

BY = {"coverage": "coverage", "majority": "majority vote"}
NBSP = "\u00a0"


@dataclass(frozen=True, slots=True)
class Headline:
    """The first sentence of the page, the evidence for it, and the budget it speaks of."""

    sentence: str
    evidence: str
    metric: str
    model: str
    seconds: float
    won: bool


def percent(value: float | None) -> str:
    """A share as whole percent; a dash where it is unknown."""
    return "–" if value is None or np.isnan(value) else f"{value * 100:.0f}{NBSP}%"


def points(value: float) -> str:
    """A difference of shares in percentage points with its sign, to one decimal."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(value) * 100:.1f}"


def seconds(value: float) -> str:
    """A duration with three significant digits, in minutes or hours where that reads better."""
    if value >= 5400:
        return f"{value / 3600:.1f}{NBSP}h"
    if value >= 90:
        return f"{value / 60:.1f}{NBSP}min"
    return f"{value:.3g}{NBSP}s"


def count(value: float | None) -> str:
    """A count with thousands separated, or in millions; a dash where it is unknown."""
    if value is None:
        return "–"
    if value >= 1_000_000:
        return f"{value / 1e6:,.3g}{NBSP}M"
    return f"{value:,.0f}"


def kind(run: Run, model: str) -> str:
    """What a model is: the Transformer teacher, a pure Mamba student, or a hybrid; without a plan only its role."""
    if model == run.curves.baseline:
        return "Transformer teacher" if run.plans else "teacher"
    plan = run.plans.get(model)
    if plan is None:
        return "student"
    if plan.kept == 0:
        return "pure Mamba student"
    if plan.kept == len(plan.layers):
        return "attention student"
    return "hybrid student"


def _named(run: Run, model: str) -> str:
    """Its kind, with the name added where another student is of the same kind or no plan tells one."""
    mine = kind(run, model)
    twins = sum(kind(run, other) == mine for other in run.curves.students)
    return f"{mine} “{model}”" if twins > 1 or model not in run.plans else mine


def _teacher(run: Run) -> str:
    """The baseline in the middle of a sentence."""
    return "the teacher" if run.curves.baseline == "teacher" else run.curves.baseline


def _at(run: Run, model: str, metric: str, budget: float) -> float | None:
    index = int(np.argmin(np.abs(np.array(run.curves.seconds) - budget)))
    return run.curves.by_time[model].metric(metric).mean[index]


def _interval(low: float, high: float) -> str:
    return f"[{points(low)}, {points(high)}]"


def headline(run: Run) -> Headline:
    """The win in coverage or majority whose simultaneous band stays farthest above zero; without one, the largest lead
    and why it is none."""
    wins = [win for win in run.curves.wins if win.metric in METRICS]
    return _won(run, max(wins, key=lambda win: win.low)) if wins else _not_won(run)


def _won(run: Run, win: Win) -> Headline:
    budget = (win.from_seconds * win.to_seconds) ** 0.5 if win.at_seconds is None else win.at_seconds
    student, teacher = (_at(run, m, win.metric, budget) for m in (win.model, run.curves.baseline))
    start = f"In {seconds(budget)} per problem the {_named(run, win.model)}"
    if win.metric == "majority":
        claim = f"answers {percent(student)} of the problems by majority vote"
    else:
        claim = f"finds the answer to {percent(student)} of the problems in at least one sample"
    span = f"At every budget from {seconds(win.from_seconds)} to {seconds(win.to_seconds)}"
    if win.from_seconds == win.to_seconds:
        span = f"At {seconds(win.from_seconds)}"
    return Headline(
        sentence=f"{start} {claim}, its {kind(run, run.curves.baseline)} {percent(teacher)}.",
        evidence=f"The difference is {points(win.difference)} percentage points, {percent(run.curves.confidence)} band "
        f"{_interval(win.low, win.high)}. {span} the student is ahead under a band that holds for all "
        f"{len(run.curves.seconds)} budgets at once.",
        metric=win.metric,
        model=win.model,
        seconds=budget,
        won=True,
    )


def _not_won(run: Run) -> Headline:
    best: tuple[float, str, str, int] | None = None
    for model in run.curves.students:
        for metric in METRICS:
            mean = run.curves.difference[model].metric(metric).mean
            for index, value in enumerate(mean):
                if value is not None and not np.isnan(value) and (best is None or value > best[0]):
                    best = (value, model, metric, index)
    teacher = kind(run, run.curves.baseline)
    if best is None:
        last = run.curves.seconds[-1]
        share = _at(run, run.curves.baseline, "majority", last)
        return Headline(
            f"In {seconds(last)} per problem the {teacher} answers {percent(share)} of the problems by majority vote.",
            "No student was measured.",
            "majority",
            run.curves.baseline,
            last,
            won=False,
        )
    value, model, metric, index = best
    curve = run.curves.difference[model].metric(metric)
    low, high = (curve.band_low or curve.low)[index], (curve.band_high or curve.high)[index]
    budget = run.curves.seconds[index]
    band = "" if low is None or high is None else f", {percent(run.curves.confidence)} band {_interval(low, high)}"
    return Headline(
        sentence=f"At no measured budget is a student shown to be ahead of its {teacher}.",
        evidence=f"{'The largest lead' if value > 0 else 'The nearest approach'} is {points(value)} percentage points "
        f"by {BY[metric]}, of {model} at {seconds(budget)} per problem{band}: the band that holds for all "
        f"{len(run.curves.seconds)} budgets at once does not clear zero.",
        metric=metric,
        model=model,
        seconds=budget,
        won=False,
    )


def _ranges(grid: Sequence[float], flags: Sequence[bool]) -> list[tuple[float, float]]:
    """First and last grid value of each run of true flags."""
    runs = [
        [grid[index] for index, _ in group]
        for flag, group in groupby(enumerate(flags), key=lambda pair: pair[1])
        if flag
    ]
    return [(run[0], run[-1]) for run in runs]


def _spans(spans: list[tuple[float, float]]) -> str:
    texts = [f"at {seconds(a)}" if a == b else f"from {seconds(a)} to {seconds(b)}" for a, b in spans]
    return " and ".join(texts)


def budgets(run: Run) -> list[str]:
    """Where each student and where the teacher is ahead under the simultaneous band, metric by metric."""
    said, grid = [], run.curves.seconds
    for model in run.curves.students:
        for metric in METRICS:
            curve = run.curves.difference[model].metric(metric)
            ahead = _ranges(grid, [v is not None and v > 0 for v in curve.band_low or ()])
            behind = _ranges(grid, [v is not None and v < 0 for v in curve.band_high or ()])
            parts = [f"{model} is ahead {_spans(ahead)}"] if ahead else []
            parts += [f"{_teacher(run)} is ahead of {model} {_spans(behind)}"] if behind else []
            text = "; ".join(parts) or f"neither {model} nor {_teacher(run)} is ahead at any budget"
            said.append(f"By {BY[metric]}, {text}.")
    return said


def _crossing(teacher: dict[int, float], student: dict[int, float]) -> tuple[str, float]:
    """'below', 'above', 'always' or 'never': where the teacher is faster, and the context at which that changes.

    Between two measured contexts the logarithm of the ratio is taken as linear in the logarithm of the context.
    """
    contexts = sorted(teacher.keys() & student.keys())
    lead = np.log([teacher[c] / student[c] for c in contexts])
    if (lead > 0).all() or (lead <= 0).all():
        return ("always" if lead[0] > 0 else "never"), float(contexts[0])
    index = int(np.flatnonzero(np.diff(lead > 0))[0])
    weight = lead[index] / (lead[index] - lead[index + 1])
    x = np.log(contexts[index : index + 2])
    return ("below" if lead[0] > 0 else "above"), float(np.exp(x[0] + weight * (x[1] - x[0])))


def speed(run: Run) -> list[str]:
    """At which context length the teacher decodes faster, for each student, from the speed measurements."""
    batch = common_batch(run)
    if batch is None:
        return []
    table = {
        m: {r.context: r.tokens_per_second for r in run.bench if r.model == m and r.batch == batch}
        for m in run.curves.models
    }
    teacher, said = table[run.curves.baseline], []
    for model in run.curves.students:
        shared = sorted(teacher.keys() & table[model].keys())
        if not shared:
            continue
        side, where = _crossing(teacher, table[model])
        longest = shared[-1]
        ratio = table[model][longest] / teacher[longest]
        where_faster = {
            "below": f"below a context of about {where:.0f} tokens",
            "above": f"above a context of about {where:.0f} tokens",
        }.get(side, "at every measured context")
        first, second = (model, _teacher(run)) if side == "never" else (_teacher(run), model)
        text = f"{first} decodes faster than {second} {where_faster}"
        said.append(f"At batch {batch} {text}; at {longest:,} tokens {model} runs at {ratio:.2g} times its speed.")
    return said


def method(run: Run) -> str:
    """How the times and the intervals came about."""
    curves = run.curves
    return (
        "Every sample carries the second at which it ended, on one monotonic clock that starts with the model’s first "
        "prefill. At a budget of τ seconds per problem exactly those samples count that had ended by "
        f"τ{NBSP}×{NBSP}{curves.problems:,} problems. Samples are drawn in rounds, one of every problem before the "
        "next of any. Prefill, chains of uneven length and idle slots are inside the clock; grading is not. Votes are "
        "counted per class of equal answers; a chain without an answer votes for nobody, and ties split evenly. "
        f"Intervals are {percent(curves.confidence)} bootstrap intervals over problems, the same problems for every "
        f"model, {curves.replicates:,} replicates; the wide band of a difference holds for all {len(curves.seconds)} "
        "budgets at once."
    )
