"""`thinkfast retain` on samples whose figures are known."""

import json
import shutil
from pathlib import Path

import pytest

from thinkfast import records
from thinkfast.cli import main
from thinkfast.data.problems import Problem, dump_problems
from thinkfast.data.wordproblems import generate
from thinkfast.records import SampleRow

LEVELS = (1, 1, 2, 2)


@pytest.fixture
def run(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A teacher that is always right and a student, of the same weights, that is right in one of two on level 2 alone.

    On level 1 the student's first answer is wrong and its second says one thing over and over up to the limit.
    """
    made = [generate(1, 2, "held-out", [level])[place % 2] for place, level in enumerate(LEVELS)]
    problems = [Problem(p.id, p.problem, p.answer, p.level) for p in made]
    (tmp_path / "problems.jsonl").write_text(dump_problems(problems))
    for name in ("teacher", "student"):
        shutil.copytree(tiny_teacher, tmp_path / "models" / name)
        rows = []
        for problem, solved in zip(problems, made, strict=True):
            for index in range(2):
                text, end = solved.solution, "stop"
                if name == "student" and problem.level == 1:
                    text, end = (
                        (text.rpartition("####")[0] + "#### 999", end)
                        if index == 0
                        else (" ".join(["Ava"] * 40), "length")
                    )
                elif name == "student" and index == 1:
                    text = text.rpartition("####")[0] + "#### 999"
                rows.append(SampleRow(problem.id, index, 0, text, 100 + index, end, 0.0, 1.0, -1.0, name))
        records.append_samples(tmp_path / "samples" / name, rows)
    return tmp_path


def arguments(run: Path, *names: str) -> list[str]:
    models = [str(run / "models" / name) for name in names]
    return ["retain", *models, str(run / "samples"), "--problems", str(run / "problems.jsonl")]


def test_retention_by_level(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "retention.json"
    assert main([*arguments(run, "teacher", "student"), "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == records.read_json(out)
    assert document["problems"] == {"all": 4, "1": 2, "2": 2}
    easy, hard = (document["levels"][level]["student"] for level in ("1", "2"))
    teacher = document["levels"]["all"]["teacher"]
    assert (teacher["pass@1"], teacher["well_formed"], teacher["loops"], teacher["cut_short"]) == (1, 1, 0, 0)
    assert (easy["pass@1"], easy["well_formed"], easy["cut_short"], easy["loops"]) == (0, 0.5, 0.5, 0.5)
    assert (hard["pass@1"], hard["well_formed"], hard["cut_short"], hard["loops"]) == (0.5, 1, 0, 0)
    assert easy["tokens"] == 100.5
    assert easy["repetition"] > 0.3 + hard["repetition"]
    assert hard["kept"]["pass@1"] == {"share": 0.5, "low": 0.5, "high": 0.5}
    assert document["levels"]["all"]["student"]["kept"]["well_formed"]["share"] == 0.75
    low, high = (document["levels"]["all"]["student"]["kept"]["pass@1"][key] for key in ("low", "high"))
    assert low < 0.25 < high
    assert (easy["same_vote"], hard["same_vote"]) == (0, 1)  # the first seen wins a tie
    assert (easy["kl"], easy["same_token"], easy["texts"]) == (pytest.approx(0, abs=1e-5), 1, 4)


def test_bad_input_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(run, "teacher")) == 2
    assert "one model, expected a teacher and its students" in capsys.readouterr().err
    assert main(arguments(run, "teacher", "teacher")) == 2
    assert "two models are called 'teacher'" in capsys.readouterr().err
    shutil.rmtree(run / "samples" / "student")
    assert main(arguments(run, "teacher", "student")) == 2
    assert "samples/student" in capsys.readouterr().err
    file = run / "models" / "student" / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    file.write_text(json.dumps(document))
    assert main(arguments(run, "teacher", "student")) == 2
    assert "its tokenizer is not that of" in capsys.readouterr().err
