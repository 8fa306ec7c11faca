"""Problem sets: what goes in comes out, and a bad row is named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thinkfast.data.problems import Problem, dump_problems, load_problems
from thinkfast.errors import BadInput

SET = [Problem("a", "1 + 1?", "2", 1, "1 + 1 = 2"), Problem("b", "Größe?", "3/4")]


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(dump_problems(SET), encoding="utf-8")
    assert load_problems(path) == SET


def test_parquet_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "problem": ["1 + 1?", "2 + 2?"], "answer": ["2", "4"]}), path)
    assert [problem.answer for problem in load_problems(path)] == ["2", "4"]


def test_rows_without_id_are_numbered_and_numbers_become_text(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"problem": "x", "answer": 4}\n\n{"problem": "y", "answer": 1.5}\n')
    assert [(p.id, p.answer) for p in load_problems(path)] == [("1", "4"), ("3", "1.5")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no problems in it"),
        ("{", "row 1: not valid JSON"),
        ("[1]", "row 1: expected an object"),
        ('{"problem": "x"}', "row 1: answer: expected text, got None"),
        ('{"problem": " ", "answer": "2"}', "row 1: problem: expected text"),
        ('{"problem": "x", "answer": true}', "row 1: answer: expected text, got True"),
        (
            '{"id": 1, "problem": "x", "answer": "2"}\n{"id": "1", "problem": "y", "answer": "2"}',
            "row 2: id '1' occurs",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    with pytest.raises(BadInput, match=message):
        load_problems(path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no problem file there"):
        load_problems(tmp_path / "none.jsonl")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(BadInput, match="not a Parquet file"):
        load_problems(tmp_path / "bad.parquet")
