"""Problem sets on disk: JSONL or Parquet rows with `problem` and `answer`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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


def load_problems(path: Path | str) -> list[Problem]:
    """Reads a set; a row without `id` is called by its number.

    Raises BadInput naming the file, the row and the field for a missing file, a broken row, an empty set, a missing or
    empty problem or answer, or an id that occurs twice.
    """
    source = Path(path)
    if not source.is_file():
        raise BadInput(f"{source}: no problem file there")
    rows = _parquet(source) if source.suffix == ".parquet" else _jsonl(source)
    found: dict[str, Problem] = {}
    for number, row in rows:
        problem = _problem(source, number, row)
        if problem.id in found:
            raise BadInput(f"{source}: row {number}: id {problem.id!r} occurs twice")
        found[problem.id] = problem
    if not found:
        raise BadInput(f"{source}: no problems in it")
    return list(found.values())


def dump_problems(problems: Iterable[Problem]) -> str:
    """The set as JSONL text."""
    return "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems)


def _problem(source: Path, number: int, row: Any) -> Problem:
    if not isinstance(row, dict):
        raise BadInput(f"{source}: row {number}: expected an object, got {type(row).__name__}")
    texts = {}
    for field in ("problem", "answer"):
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


def _jsonl(source: Path) -> Iterator[tuple[int, Any]]:
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{source}: row {number}: not valid JSON: {error.msg}") from error


def _parquet(source: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{source}: not a Parquet file: {str(error).splitlines()[0]}") from error
    yield from enumerate(table.to_pylist(), 1)
