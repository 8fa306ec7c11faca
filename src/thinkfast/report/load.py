"""Read a run directory for the report, and refuse what cannot be drawn with one line that names file and field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from thinkfast.data.problems import Problem, load_problems
from thinkfast.errors import BadInput
from thinkfast.records import SampleRow, ScoreRow, read_json, read_record, read_rewards, read_samples, read_scores

METRICS = ("coverage", "majority")
STRATEGIES = ("weighted", "best_of_n")
Values = list[float | None]


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Curve(_Row):
    """A mean with its pointwise interval; `band_*` holds over the whole grid at once, in differences only."""

    mean: Values
    low: Values
    high: Values
    band_low: Values | None = None
    band_high: Values | None = None


class Curves(_Row):
    """A model's metrics, with rewards also what ranking by them gives; `samples`: the mean number a problem by then."""

    coverage: Curve
    majority: Curve
    weighted: Curve | None = None
    best_of_n: Curve | None = None
    samples: Values | None = None

    def metric(self, name: str) -> Curve:
        """The curve of this name. Raises KeyError where there is none."""
        curve = {"coverage": self.coverage, "majority": self.majority}.get(name) or self.strategy(name)
        if curve is None:
            raise KeyError(name)
        return curve

    def strategy(self, name: str) -> Curve | None:
        """What choosing by rewards gives, one of `STRATEGIES`."""
        return {"weighted": self.weighted, "best_of_n": self.best_of_n}[name]


class Win(_Row):
    """A range of budgets in which the simultaneous band of the difference lies above zero."""

    model: str
    metric: str
    from_seconds: float
    to_seconds: float
    at_seconds: float | None = None
    difference: float
    low: float
    high: float


class CurveFile(_Row):
    """`curves/curves.json`."""

    baseline: str
    models: list[str] = Field(min_length=1)
    problems: int = Field(gt=0)
    confidence: float = Field(gt=0, lt=1)
    replicates: int
    k: list[int]
    seconds: list[float] = Field(min_length=1)
    by_k: dict[str, Curves]
    by_time: dict[str, Curves]
    difference: dict[str, Curves]
    wins: list[Win]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.baseline not in self.models:
            raise ValueError(f"baseline: '{self.baseline}' is not one of models {self.models}")
        if self.seconds[0] <= 0 or any(b <= a for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise ValueError("seconds: expected positive numbers that increase")
        students = [name for name in self.models if name != self.baseline]
        for field, table, names, length in (
            ("by_k", self.by_k, self.models, len(self.k)),
            ("by_time", self.by_time, self.models, len(self.seconds)),
            ("difference", self.difference, students, len(self.seconds)),
        ):
            for name in names:
                if name not in table:
                    raise ValueError(f"{field}.{name}: field is missing")
                _check_lengths(f"{field}.{name}", table[name], length, bands=field == "difference")
        for index, win in enumerate(self.wins):
            if win.model not in students or win.metric not in (*METRICS, *STRATEGIES):
                raise ValueError(f"wins.{index}: unknown student '{win.model}' or metric '{win.metric}'")
        return self

    @property
    def students(self) -> list[str]:
        return [name for name in self.models if name != self.baseline]

    def metrics(self, table: dict[str, Curves]) -> list[str]:
        """What `table` (by_k or by_time) has of every model."""
        return [*METRICS, *(n for n in STRATEGIES if all(table[model].strategy(n) for model in self.models))]


def _check_lengths(where: str, curves: Curves, length: int, bands: bool) -> None:
    columns = ("mean", "low", "high", "band_low", "band_high") if bands else ("mean", "low", "high")
    for metric in METRICS:
        for column in columns:
            values = getattr(curves.metric(metric), column)
            if values is None:
                raise ValueError(f"{where}.{metric}.{column}: field is missing")
            if len(values) != length:
                raise ValueError(f"{where}.{metric}.{column}: {len(values)} values, expected {length}")
    if curves.samples is not None and len(curves.samples) != length:
        raise ValueError(f"{where}.samples: {len(curves.samples)} values, expected {length}")


class Tensor(_Row):
    """A tensor of a student, how it was made and from what."""

    name: str
    how: str
    source: str | None = None


class Layer(_Row):
    """A layer: its mixer in teacher and student, and its tensors."""

    index: int
    teacher: str
    student: str
    tensors: list[Tensor] = []


class Plan(_Row):
    """`models/<student>/plan.json`: what became of each layer; `parameters` counts numbers by how they were made."""

    layers: list[Layer] = Field(min_length=1)
    tensors: list[Tensor] = []
    parameters: dict[str, int] = {}

    @property
    def kept(self) -> int:
        """Layers that are still attention."""
        return sum(layer.student == "attention" for layer in self.layers)


class Summary(_Row):
    """`summary.json`, any part of which may be absent: it is written while the run goes on."""

    seconds: float | None = None
    models: dict[str, dict[str, Any]] = {}
    stages: dict[str, float] = {}


class BenchRow(_Row):
    """A measured decoding speed."""

    model: str
    batch: int
    context: int
    tokens_per_second: float = Field(gt=0)


class Sample(NamedTuple):
    """A sample, its grade and its reward where it was scored."""

    row: SampleRow
    grade: ScoreRow
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the report says about a model's samples: totals over all problems, rows for the shown ones by time."""

    samples: int
    pass_at_1: float
    mean_tokens: float
    tokens_per_second: float
    cut: float
    shown: dict[str, list[Sample]]


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the page shows."""

    path: Path
    curves: CurveFile
    summary: Summary
    plans: dict[str, Plan]
    problems: list[Problem]
    sampled: dict[str, Sampled]
    bench: list[BenchRow]
    record: dict[str, Any]


T = TypeVar("T", bound=BaseModel)


def _reason(error: ValidationError) -> str:
    """`field.path: what is wrong` of the first complaint."""
    first = error.errors()[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where}: field is missing"
    return f"{where}: {message}" if where else message


def _read(kind: type[T], path: Path) -> T:
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise BadInput(f"{path}: {_reason(error)}") from None


def _sampled(run: Path, model: str, shown: list[str]) -> Sampled:
    folder, scores_path = run / "samples" / model, run / "scores" / f"{model}.parquet"
    samples, scores = read_samples(folder), read_scores(scores_path)
    if not samples:
        raise BadInput(f"{folder}: no samples of model '{model}' in part-*.parquet")
    grades = {(score.problem_id, score.sample_index): score for score in scores}
    rewards = {(one.problem_id, one.sample_index): one.reward for one in read_rewards(run / "rewards" / model)}
    right: dict[str, list[bool]] = {}
    rows: dict[str, list[Sample]] = {problem: [] for problem in shown}
    for sample in samples:
        grade = grades.get((sample.problem_id, sample.sample_index))
        if grade is None:
            raise BadInput(f"{scores_path}: no row for sample {sample.sample_index} of problem {sample.problem_id}")
        right.setdefault(sample.problem_id, []).append(grade.correct)
        if sample.problem_id in rows:
            reward = rewards.get((sample.problem_id, sample.sample_index))
            rows[sample.problem_id].append(Sample(sample, grade, reward))
    for found in rows.values():
        found.sort(key=lambda one: (one.row.t_end, one.row.sample_index))
    tokens = sum(sample.token_count for sample in samples)
    return Sampled(
        samples=len(samples),
        pass_at_1=mean(mean(map(float, verdicts)) for verdicts in right.values()),
        mean_tokens=tokens / len(samples),
        tokens_per_second=tokens / max(max(sample.t_end for sample in samples), 1e-9),
        cut=mean(float(sample.finish_reason == "length") for sample in samples),
        shown=rows,
    )


def _bench(path: Path) -> list[BenchRow]:
    if not path.is_file():
        return []
    document = read_json(path)
    rows = document.get("rows") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise BadInput(f"{path}: rows: expected a list")
    found = []
    for index, row in enumerate(rows):
        try:
            found.append(BenchRow.model_validate(row))
        except ValidationError as error:
            raise BadInput(f"{path}: rows.{index}.{_reason(error)}") from None
    return found


def _record(run: Path, baseline: str) -> dict[str, Any]:
    """The record of how the baseline's samples were drawn, else of how the curves were made."""
    return read_record(run / "samples" / baseline) or read_record(run / "curves") or {}


def load_run(run_dir: Path, shown: int) -> Run:
    """Read the files of a run that the page shows; `shown` problems keep their samples, evenly spaced in file order.

    Needed: `curves/curves.json`, `problems/problems.jsonl` and, for every model of the curves, `samples/<model>/` and
    `scores/<model>.parquet`. Used where they exist: `rewards/<model>/`, `summary.json`, `models/<model>/plan.json`,
    `bench.json` and the `run.json` beside the samples. Raises `BadInput` naming file and field.
    """
    if not run_dir.is_dir():
        raise BadInput(f"{run_dir}: not a run directory")
    if shown < 1:
        raise BadInput(f"shown = {shown}: expected at least one problem")
    curves = _read(CurveFile, run_dir / "curves" / "curves.json")
    problems = load_problems(run_dir / "problems" / "problems.jsonl")
    count = min(shown, len(problems))
    chosen = [problems[index * len(problems) // count] for index in range(count)]
    summary_path = run_dir / "summary.json"
    plans = {name: run_dir / "models" / name / "plan.json" for name in curves.students}
    return Run(
        path=run_dir,
        curves=curves,
        summary=_read(Summary, summary_path) if summary_path.is_file() else Summary(),
        plans={name: _read(Plan, path) for name, path in plans.items() if path.is_file()},
        problems=chosen,
        sampled={name: _sampled(run_dir, name, [problem.id for problem in chosen]) for name in curves.models},
        bench=_bench(run_dir / "bench.json"),
        record=_record(run_dir, curves.baseline),
    )
