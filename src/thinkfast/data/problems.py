"""Problem sets on disk: JSONL or Parquet rows with `problem` and `answer`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinkfast.errors import BadInput


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its gold answer; `id` is unique in its set."""

    id: str
    problem: str
    answer: str
    level: int | None = None
    solution: str | None = None


Complain = Callable[[str], None]
"""Takes one line about a row that cannot be used."""


def refuse(line: str) -> None:
    """A `Complain` that stops at the first unusable row."""
    raise BadInput(line)


def load_problems(path: Path | str, complain: Complain = refuse, answers: bool = True) -> list[Problem]:
    """Reads a set; a row without `id` is called by its number.

    answers: False for open-ended prompts, whose answers are not read and are "".

    Raises BadInput naming the file for a missing file and an empty set. `complain` gets a line with the file, the row
    and the field for a broken row, a missing or empty problem or answer, and an id that occurs twice; such a row is
    left out when it returns.
    """
    source = Path(path)
    if not source.is_file():
        raise BadInput(f"{source}: no problem file there")
    rows = _parquet(source) if source.suffix == ".parquet" else _jsonl(source, complain)
    return collect_problems(str(source), rows, complain, answers)


def collect_problems(
    source: str, rows: Iterable[tuple[int, Any]], complain: Complain = refuse, answers: bool = True
) -> list[Problem]:
    """Problems out of numbered rows; errors as in `load_problems`."""
    found: dict[str, Problem] = {}
    for number, row in rows:
        try:
            problem = _problem(source, number, row, answers)
        except BadInput as error:
            complain(str(error))
            continue
        if problem.id in found:
            complain(f"{source}: row {number}: id {problem.id!r} occurs twice")
            continue
        found[problem.id] = problem
    if not found:
        raise BadInput(f"{source}: no problems in it")
    return list(found.values())


def dump_problems(problems: Iterable[Problem]) -> str:
    """The set as JSONL text."""
    return "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)


def _problem(source: str, number: int, row: Any, answers: bool) -> Problem:
    if not isinstance(row, dict):
        raise BadInput(f"{source}: row {number}: expected an object, got {type(row).__name__}")
    texts = {"answer": ""}
    for field in ("problem", "answer") if answers else ("problem",):
        value = row.get(field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise BadInput(f"{source}: row {number}: {field}: expected text, got {value!r}")
        texts[field] = value
    level, solution = row.get("level"), row.get("solution")
    return Problem(
        id=str(row.get("id", number)),
        problem=texts["problem"],
        answer=texts["answer"],
        level=level if isinstance(level, int) else None,
        solution=solution if isinstance(solution, str) else None,
    )


def _jsonl(source: Path, complain: Complain) -> Iterator[tuple[int, Any]]:
    with (
        gzip.open(source, "rt", encoding="utf-8") if source.suffix == ".gz" else source.open(encoding="utf-8") as lines
    ):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                complain(f"{source}: row {number}: not valid JSON: {error.msg}")
                continue
            yield number, row


def _parquet(source: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{source}: not a Parquet file: {str(error).splitlines()[0]}") from error
    yield from enumerate(table.to_pylist(), 1)
