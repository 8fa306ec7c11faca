"""From samples to verdicts, tables, curves and the summary of a run, for runs and for completions made elsewhere."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast import records, runtime
from thinkfast.data.problems import Problem
from thinkfast.errors import BadInput
from thinkfast.recipe import TEACHER, Compare
from thinkfast.records import RewardRow, SampleRow, ScoreRow

if TYPE_CHECKING:
    from thinkfast.scale.budget import Table

CUT_OFF = "deadline"


@dataclass(frozen=True, slots=True)
class Graded:
    """Samples of one model with their verdicts, row by row; `timed` tells whether t_end was measured.

    grading: seconds that each verdict took. rewards: those of the samples, by problem and index.
    """

    samples: list[SampleRow]
    scores: list[ScoreRow]
    timed: bool = True
    grading: list[float] | None = None
    rewards: dict[tuple[str, int], RewardRow] | None = None


def grade(samples: Sequence[SampleRow], problems: Sequence[Problem]) -> list[ScoreRow]:
    """The verdict of every sample, in the order of the samples; a sample the clock cut off has no answer."""
    return grade_timed(samples, problems)[0]


def grade_timed(samples: Sequence[SampleRow], problems: Sequence[Problem]) -> tuple[list[ScoreRow], list[float]]:
    """`grade`, and the seconds that every verdict took: those of its problem, evenly over the problem's samples."""
    from thinkfast.scale.grade import Grader, extract_answer

    gold = {problem.id: problem.answer for problem in problems}
    places: dict[str, list[int]] = {}
    for place, row in enumerate(samples):
        if row.problem_id not in gold:
            raise BadInput(f"a sample is of problem {row.problem_id!r}, which is not among the {len(gold)} problems")
        places.setdefault(row.problem_id, []).append(place)
    answers = [None if row.finish_reason == CUT_OFF else extract_answer(row.text) for row in samples]
    scores: dict[int, ScoreRow] = {}
    seconds = [0.0] * len(samples)
    workers = runtime.usable_cores()
    with Grader(workers=workers) as grader, ThreadPoolExecutor(workers) as pool:

        def judge(item: tuple[str, list[int]]) -> tuple[list[int], list[bool], float]:
            started = time.monotonic()
            classes, correct = grader.grade(gold[item[0]], [answers[i] for i in item[1]])
            return classes, correct, (time.monotonic() - started) / len(item[1])

        verdicts = pool.map(judge, places.items())
        for (problem, rows), (classes, correct, each) in zip(places.items(), verdicts, strict=True):
            for place, klass, right in zip(rows, classes, correct, strict=True):
                scores[place] = ScoreRow(problem, samples[place].sample_index, answers[place], klass, right)
                seconds[place] = each
    return [scores[place] for place in range(len(samples))], seconds


def read_graded(run: Path, name: str) -> Graded:
    """Samples and verdicts of one model of a run directory, with the rewards in rewards/NAME where all have one."""
    samples, scores = (
        records.read_samples(run / "samples" / name),
        records.read_scores(run / "scores" / f"{name}.parquet"),
    )
    if [(row.problem_id, row.sample_index) for row in samples] != [
        (row.problem_id, row.sample_index) for row in scores
    ]:
        raise BadInput(f"{run / 'scores' / name}.parquet: does not belong to the samples in {run / 'samples' / name}")
    rewards = {(row.problem_id, row.sample_index): row for row in records.read_rewards(run / "rewards" / name)}
    whole = all((row.problem_id, row.sample_index) in rewards for row in samples)
    return Graded(samples, scores, rewards=rewards if rewards and whole else None)


def read_completions(path: Path, answers: bool = True) -> tuple[list[Problem], list[SampleRow], bool]:
    """JSONL rows with `problem`, `answer`, `completions` and, where they were measured, lists as long of seconds:
    `t_end`, and `t_start`, without which they cannot be replayed.

    Returns the problems, a sample for every completion, and whether all of them are timed. Raises BadInput naming the
    file, the row and the field.
    """
    from thinkfast.data.problems import load_problems

    problems = load_problems(path, answers=answers)
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    samples: list[SampleRow] = []
    timed = True
    for number, (problem, line) in enumerate(zip(problems, lines, strict=True), 1):
        row = json.loads(line)
        texts, ends = row.get("completions"), row.get("t_end")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"{path}: row {number}: completions: expected a list of texts")
        timed = timed and ends is not None
        ends = [0.0] * len(texts) if ends is None else ends
        numbers = isinstance(ends, list) and all(isinstance(end, int | float) for end in ends)
        if not numbers or len(ends) != len(texts):
            raise BadInput(f"{path}: row {number}: t_end: expected {len(texts)} numbers of seconds, one a completion")
        starts = row.get("t_start", [math.nan] * len(texts))
        if not isinstance(starts, list) or len(starts) != len(texts):
            raise BadInput(f"{path}: row {number}: t_start: expected {len(texts)} numbers of seconds, one a completion")
        samples += [
            SampleRow(problem.id, index, 0, text, 0, "stop", float(begun), float(end), 0.0, path.stem)
            for index, (text, begun, end) in enumerate(zip(texts, starts, ends, strict=True))
        ]
    return problems, samples, timed


def read_texts(
    source: Path, problems_file: Path | None, answers: bool = True
) -> tuple[list[Problem], list[SampleRow], bool]:
    """Problems, samples and whether they are timed: a directory of samples, whose problems stand in `problems_file`
    or are a public set of that name, or completions in JSONL. answers: False where nobody needs right ones."""
    from thinkfast.data.sets import open_problems

    if not source.is_dir():
        return read_completions(source, answers)
    samples = records.read_samples(source)
    if not samples:
        raise BadInput(f"{source}: holds no part-*.parquet with samples")
    if problems_file is None:
        raise BadInput(f"{source}: --problems is needed to grade a directory of samples")
    problems = open_problems(problems_file, answers=answers)
    known = {problem.id for problem in problems}
    strange = next((row.problem_id for row in samples if row.problem_id not in known), None)
    if strange is not None:
        raise BadInput(f"{source}: a sample is of problem {strange!r}, which {problems_file} does not hold")
    return problems, samples, True


def read_source(source: Path, problems_file: Path | None) -> tuple[list[Problem], Graded]:
    """`read_texts`, graded."""
    problems, samples, timed = read_texts(source, problems_file)
    try:
        scores, seconds = grade_timed(samples, problems)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None
    return problems, Graded(samples, scores, timed, seconds)


def grade_source(source: Path, problems_file: Path | None, out: Path | None) -> dict[str, Any]:
    """Grades a source, stores the verdicts in `out` where given, and returns the shares of `scored` with the counts."""
    problems, graded = read_source(source, problems_file)
    if out is not None:
        records.write_scores(out, graded.scores)
    return {"problems": len(problems), "samples": len(graded.samples), **scored(graded, problems)}


def sample_counts(directory: Path) -> dict[str, int]:
    """Finished samples of every problem that has any, in a directory of samples."""
    counts: dict[str, int] = {}
    for row in records.read_samples(directory):
        if row.finish_reason != CUT_OFF:
            counts[row.problem_id] = counts.get(row.problem_id, 0) + 1
    return counts


def source_name(source: Path) -> str:
    """What a source is called: its directory, or its file up to the first dot."""
    return source.resolve().name if source.is_dir() else source.name.split(".")[0]


def table(graded: Graded, problems: Sequence[Problem], counted: Collection[str] = ()) -> Table:
    """The columns that curves are made of; samples the clock cut off do not count.

    counted: "grading" and "rewards" put those seconds into the clock as well: a sample then ends when it and all that
    ended before it are graded or scored, one after the other.
    """
    import numpy as np

    from thinkfast.scale.budget import Table

    place = {problem.id: index for index, problem in enumerate(problems)}
    rows = zip(graded.samples, graded.scores, graded.grading or [0.0] * len(graded.samples), strict=True)
    held = [row for row in rows if row[0].finish_reason != CUT_OFF]
    pairs = [(row, score) for row, score, _ in held]
    rewards = None
    if graded.rewards is not None:
        rewards = [graded.rewards[row.problem_id, row.sample_index] for row, _ in pairs]
    ends = np.array([row.t_end for row, _ in pairs], dtype=np.float64)
    after = np.zeros(len(pairs))
    if "grading" in counted:
        after += [seconds for *_, seconds in held]
    if "rewards" in counted and rewards is not None:
        after += [reward.seconds for reward in rewards]
    order = np.argsort(ends, kind="stable")
    ends[order] += after[order].cumsum()
    return Table(
        problem=np.array([place[row.problem_id] for row, _ in pairs], dtype=np.int64),
        sample_index=np.array([row.sample_index for row, _ in pairs], dtype=np.int64),
        t_end=ends,
        answer_class=np.array([score.answer_class for _, score in pairs], dtype=np.int64),
        correct=np.array([score.correct for _, score in pairs], dtype=bool),
        seconds=np.array([row.t_end - row.t_start for row, _ in pairs], dtype=np.float64) if graded.timed else None,
        score=None if rewards is None else np.array([reward.reward for reward in rewards], dtype=np.float64),
    )


def compare(graded: Mapping[str, Graded], problems: Sequence[Problem], settings: Compare) -> dict[str, Any]:
    """The document of `curves.json`; without measured times it ends at the curves against k."""
    tables = {name: table(entry, problems) for name, entry in graded.items()}
    return compare_tables(tables, len(problems), settings)


def compare_tables(tables: Mapping[str, Table], problems: int, settings: Compare) -> dict[str, Any]:
    """`compare` of tables; a table without seconds was not timed."""
    from thinkfast.scale.budget import curves

    timed = all(entry.seconds is not None for entry in tables.values())
    grid = settings.grid.seconds if timed else [1.0]
    document = curves(tables, problems, settings.baseline, grid, settings.ks, settings.seed, settings.replicates)
    if timed:
        return document
    return {key: value for key, value in document.items() if key not in ("seconds", "by_time", "difference", "wins")}


def scored(graded: Graded, problems: Sequence[Problem]) -> dict[str, float]:
    """pass@1, coverage and majority with everything that was drawn, each a share of all problems."""
    from thinkfast.scale.aggregate import majority_vote

    by_problem: dict[str, list[ScoreRow]] = {problem.id: [] for problem in problems}
    for sample, score in zip(graded.samples, graded.scores, strict=True):
        if sample.finish_reason != CUT_OFF:
            by_problem[score.problem_id].append(score)
    first = covered = voted = 0.0
    for rows in by_problem.values():
        right = {row.answer_class for row in rows if row.correct}
        first += sum(row.correct for row in rows) / max(len(rows), 1)
        covered += bool(right)
        voted += majority_vote([row.answer_class if row.answer_class >= 0 else None for row in rows]) in right
    count = len(by_problem)
    return {"pass@1": first / count, "coverage": covered / count, "majority": voted / count}


def summary(
    models: Sequence[str], problems: Sequence[Problem], run: Path, stages: Mapping[str, float]
) -> dict[str, Any]:
    """The document of `summary.json`; `seconds` is the sum over the stages, sessions that were cut off included."""
    document = records.read_json(run / "curves" / "curves.json")
    return {
        "command": runtime.command(),
        "seconds": round(sum(stages.values()), 3),
        "problems": len(problems),
        "models": {name: _model_summary(name, problems, run, document) for name in models},
        "wins": document["wins"],
        "stages": dict(stages),
    }


def _model_summary(name: str, problems: Sequence[Problem], run: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    graded = read_graded(run, name)
    drawn = (records.read_record(run / "samples" / name) or {})["notes"]
    made = (records.read_record(run / "models" / name) or {})["notes"]
    training = made.get("train", {})
    clock, tokens = drawn["drawn"]["seconds"], drawn["drawn"]["tokens"]
    return {
        **scored(graded, problems),
        "majority": document["by_time"][name]["majority"]["mean"][-1],
        "samples": len(graded.samples),
        "mean_tokens": tokens / max(len(graded.samples), 1),
        "sample_seconds": clock,
        "tokens_per_second": tokens / max(clock, 1e-9),
        "slots": drawn["slots"]["chosen"],
        "resumes": len(drawn.get("resumes", [])),
        "train_tokens": sum(int(stage["tokens"]) for stage in training.values()),
        "train_seconds": sum(stage["seconds"] for stage in training.values()),
        "kl": 0.0 if name == TEACHER else made["kl"],
    }


def wins_in_words(summary: Mapping[str, Any], baseline: str = TEACHER) -> list[str]:
    """One line for every range of time in which a student is above the baseline with its whole band."""
    wins = summary["wins"]
    if not wins:
        return [f"No model is above the {baseline} with its whole 95 % band at any time of the grid."]
    return [
        f"{win['model']} beats the {baseline} in {win['metric']} from {win['from_seconds']:.3g} to "
        f"{win['to_seconds']:.3g} s a problem: {win['difference']:+.3f} [{win['low']:+.3f}, {win['high']:+.3f}] "
        f"at {win['at_seconds']:.3g} s"
        for win in wins
    ]


def curves_in_words(document: Mapping[str, Any]) -> list[str]:
    """A line for every model and k with what is known there, then the wins where time was measured."""
    lines = []
    for name, curves in document["by_k"].items():
        for place, k in enumerate(document["k"]):
            told = "  ".join(f"{metric} {curve['mean'][place]:.3f}" for metric, curve in curves.items())
            lines.append(f"{name:<12} k {k:>4}  {told}")
    return lines + (wins_in_words(document, document["baseline"]) if "wins" in document else [])


def print_summary(summary: Mapping[str, Any], baseline: str = TEACHER) -> None:
    """A table of the models and the wins in words, on stdout."""
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(box=None, header_style="bold")
    shown.add_column("model")
    for title in ("pass@1", "coverage", "majority", "samples", "tokens/s", "KL", "train tokens"):
        shown.add_column(title, justify="right")
    for name, row in summary["models"].items():
        rates = (f"{row[key]:.3f}" for key in ("pass@1", "coverage", "majority"))
        kl = f"{row['kl']:.4f}" if row["train_tokens"] else ""
        trained = f"{row['train_tokens'] / 1e6:.2f}M" if row["train_tokens"] else ""
        shown.add_row(name, *rates, f"{row['samples']:,}", f"{row['tokens_per_second']:,.0f}", kl, trained)
    console = Console(highlight=False)
    console.print(shown)
    for line in wins_in_words(summary, baseline):
        console.print(line, soft_wrap=True)
