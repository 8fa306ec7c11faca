"""Typed recipes: one TOML file a run, unknown keys refused, `--set section.key=value` overrides."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator

from thinkfast.errors import BadInput
from thinkfast.sections import (
    Align,
    Base,
    Compute,
    Count,
    Distill,
    Matrices,
    Name,
    OnPolicy,
    Positive,
    Section,
    Seed,
    Sft,
    Student,
    Watching,
)

TEACHER = "teacher"
TRAINED = ("matrices", "align", "distill", "sft", "on_policy")
S = TypeVar("S", bound="Section")
Levels = Annotated[tuple[int, ...], Field(min_length=1)]


class Teacher(Section):
    """The model to distil: a stock directory, or "bundled"."""

    path: str = "bundled"


class Problems(Section):
    """Held-out problems that are sampled and graded: generated ones, or a file of JSONL or Parquet rows."""

    seed: Seed = 0
    count: Count = 300
    levels: Levels = (3, 4, 5)
    path: str | None = None


class TextSource(Section):
    """Rows of files (`data/*.parquet`) or of a Hugging Face data set (`hf:owner/name`), see `data/sources.py`."""

    path: str
    weight: Positive = 1.0
    split: str = "train"
    config: str | None = None
    text: str = "text"
    solution: str = "solution"


class Text(Section):
    """Training text: generated problems of the train split with their solutions, a file with both, a directory that was
    tokenised before, or several `sources`, mixed by weight until there are `tokens` of them.

    `held_out` documents are kept from training to measure the KL divergence on.
    """

    seed: Seed = 0
    problems: Count = 20_000
    levels: Levels = (3, 4, 5)
    path: str | None = None
    held_out: Count = 200
    sources: tuple[TextSource, ...] = ()
    tokens: Count | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.path is not None and self.sources:
            raise ValueError("path and sources exclude each other")
        if self.tokens is not None and not self.sources:
            raise ValueError("tokens is for sources, and there are none")
        return self


class SampleSettings(Section):
    """How every model draws its samples. `slots`: completions decoded at once, the fastest of several. `stop_error`: a
    problem whose vote is decided with at most this error gets no further sample; absent, all get the same."""

    n: Count = 64
    seconds: Positive = 60.0
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_tokens: Count = 512
    slots: Annotated[tuple[Count, ...], Field(min_length=1)] = (128,)
    trial_seconds: Positive = 1.0
    stop_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Seed = 0


class Bench(Section):
    """Decoding speed at full slots, measured for the report; without batches it is left out."""

    batches: tuple[Count, ...] = ()
    contexts: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 128, 256, 512, 1000)
    backends: Annotated[tuple[str, ...], Field(min_length=1)] = ("auto",)
    shared: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    prompts: tuple[Count, ...] = ()


class Grid(Section):
    """Seconds per problem, log-spaced, fixed before anything is sampled."""

    first: Positive = 0.01
    last: Positive = 0.2
    points: Annotated[int, Field(ge=2)] = 40

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.last <= self.first:
            raise ValueError(f"last {self.last} is not above first {self.first}")
        return self

    @property
    def seconds(self) -> list[float]:
        """The grid from first to last."""
        steps = self.points - 1
        inner = [self.first * (self.last / self.first) ** (i / steps) for i in range(1, steps)]
        return [self.first, *inner, self.last]


class Compare(Section):
    """Curves against k and against time, and the difference to `baseline`."""

    baseline: Name = TEACHER
    grid: Grid = Grid()
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32, 64)
    replicates: Count = 2000
    seed: Seed = 0

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.ks) != sorted(set(self.ks)):
            raise ValueError(f"ks {list(self.ks)} are not ascending")
        return self


class Report(Section):
    """The page: how many problems it shows with their completions."""

    problems: Count = 60


class Recipe(Section):
    """A whole run, every default filled in."""

    teacher: Teacher = Teacher()
    problems: Problems = Problems()
    corpus: Text = Text()
    matrices: Matrices = Matrices()
    align: Align = Align()
    distill: Distill = Distill()
    sft: Sft = Sft()
    on_policy: OnPolicy = OnPolicy()
    base: Base | None = None
    student: Annotated[tuple[Student, ...], Field(min_length=1)]
    sample: SampleSettings = SampleSettings()
    bench: Bench = Bench()
    compare: Compare = Compare()
    report: Report = Report()
    watch: Watching = Watching()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [TEACHER, *(student.name for student in self.student)]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ValueError(f"student name {name!r} is used twice")
        for student in self.student:
            if student.start == "base" and self.base is None:
                raise ValueError(f"student {student.name!r} starts from the base, but there is no table base")
            if student.start == "base" and self.base is not None and student.mixer != self.base.mixer:
                raise ValueError(f"student {student.name!r} has mixer {student.mixer!r}, the base {self.base.mixer!r}")
        if self.compare.baseline not in names:
            raise ValueError(f"compare.baseline {self.compare.baseline!r} is not one of {', '.join(names)}")
        needed = self.compare.grid.last * self.problems.count
        if self.problems.path is None and needed > self.sample.seconds * (1 + 1e-9):
            grid = f"compare.grid.last {self.compare.grid.last:g} x {self.problems.count} problems is {needed:g} s"
            raise ValueError(f"{grid}, more than the {self.sample.seconds:g} s of sample.seconds")
        return self

    @property
    def models(self) -> list[str]:
        """The teacher, then the students, in the order they are sampled."""
        return [TEACHER, *(student.name for student in self.student)]


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; `overrides` are `section.key=value` with TOML values, later ones win.

    Raises BadInput with one line that names the file and the key, for a missing or broken file, an unknown key (with
    the nearest known one), a value of the wrong type or out of range, or an override that does not parse.
    """
    source = Path(path)
    try:
        raw = tomllib.loads(source.read_text())
    except FileNotFoundError:
        raise BadInput(f"{source}: no such recipe") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise BadInput(f"{source}: cannot be read as a recipe: {error.__class__.__name__}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{source}: not valid TOML: {error}") from None
    return with_overrides(raw, str(source), overrides)


def with_overrides(raw: dict[str, Any], source: str, overrides: Sequence[str]) -> Recipe:
    """Checks a recipe that is already a dictionary, after its overrides; `source` names it in errors."""
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, f"{source} (with --set)" if overrides else source)


def section(kind: type[S], values: Mapping[str, Any]) -> S:
    """One section from values of the command line. Raises BadInput naming the value and what was expected."""
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise BadInput(_first_error(error, kind)) from None


def parse_recipe(raw: dict[str, Any], source: str) -> Recipe:
    """Checks a recipe that is already a dictionary; `source` names it in errors."""
    students = raw.get("student")
    if isinstance(students, list):
        raw = {**raw, "student": [_with_defaults(raw, student, TRAINED) for student in students]}
    if isinstance(raw.get("base"), dict):
        raw = {**raw, "base": _with_defaults(raw, raw["base"], ("matrices", "align"))}
    try:
        return Recipe.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise BadInput(f"{source}: {_first_error(error)}") from None


def _with_defaults(raw: Mapping[str, Any], student: Any, stages: Sequence[str]) -> Any:
    """A student's tables of stages over the recipe's."""
    if not isinstance(student, dict):
        return student
    merged = dict(student)
    for section in stages:
        common, own = raw.get(section, {}), student.get(section, {})
        if isinstance(common, dict) and isinstance(own, dict):
            merged[section] = {**common, **own}
    return merged


def _override(raw: dict[str, Any], text: str) -> None:
    """Applies one `a.b=value`; a number in the path is an index of an array of tables."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise BadInput(f"--set {text}: expected section.key=value")
    place: Any = raw
    for part in parts[:-1]:
        if isinstance(place, list):
            place = _element(place, part, text)
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise BadInput(f"--set {text}: {part!r} lies inside a value, not a section")
    if not isinstance(place, dict):
        raise BadInput(f"--set {text}: {'.'.join(parts[:-1])} is not a section")
    place[parts[-1]] = _value(value.strip(), text)


def _element(tables: list[Any], part: str, text: str) -> Any:
    """The table called or numbered `part`."""
    for index, table in enumerate(tables):
        if part == str(index) or (isinstance(table, dict) and table.get("name") == part):
            return table
    known = ", ".join(str(table.get("name")) for table in tables if isinstance(table, dict))
    raise BadInput(f"--set {text}: no {part!r}, expected one of {known} or a number below {len(tables)}")


def _value(value: str, text: str) -> Any:
    """A TOML value; a bare word is text, so that `--set teacher.path=models/mine` needs no quotes."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if not value or value[0] in "\"'[{" or "\n" in value:
            raise BadInput(f"--set {text}: {value!r} is not a TOML value") from None
        return value


def _first_error(error: ValidationError, root: type[Section] = Recipe) -> str:
    """One line for the first thing wrong: an unknown key first, since it may be why another is missing."""
    problems = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    first = problems[0]
    # Which alternative of a union was tried is no part of the place.
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("literal[", "dict[")))
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{where}: unknown key, " + (f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}")
    if first["type"] == "missing":
        return f"{where}: missing"
    message = first["msg"].removeprefix("Value error, ")
    if not where or isinstance(first["input"], dict):
        return f"{where}: {message}".removeprefix(": ")
    return f"{where}: {message[0].lower()}{message[1:]}, not {json.dumps(first['input'], default=str)}"


def _known_keys(root: type[Section], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `location`."""
    section: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        inner = (annotation, *get_args(annotation))
        section = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, Section))
    return list(section.model_fields)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML with every default written out; `load_recipe` reads the same recipe from it."""
    lines: list[str] = []
    for name, section in recipe.model_dump(mode="json", exclude_none=True).items():
        if isinstance(section, list):
            for table in section:
                _dump_table(lines, name, table, array=True)
        else:
            _dump_table(lines, name, section, array=False)
    return "\n".join(lines).lstrip("\n") + "\n"


def _dump_table(lines: list[str], name: str, table: Mapping[str, Any], array: bool) -> None:
    lines.append(f"\n[[{name}]]" if array else f"\n[{name}]")
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    arrays = {
        key: value
        for key, value in table.items()
        if value and isinstance(value, list) and isinstance(value[0], Mapping)
    }
    lines.extend(f"{key} = {_toml(value)}" for key, value in table.items() if key not in inner | arrays)
    for key, value in inner.items():
        _dump_table(lines, f"{name}.{key}", value, array=False)
    for key, tables in arrays.items():
        for value in tables:
            _dump_table(lines, f"{name}.{key}", value, array=True)


def _toml(value: object) -> str:
    """JSON is TOML for these values, but for one sign that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
