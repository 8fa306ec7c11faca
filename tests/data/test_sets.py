import json
from pathlib import Path

import pytest

from thinkfast.data.problems import load_problems
from thinkfast.data.sets import SETS, normalised, open_problems
from thinkfast.errors import BadInput


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("gsm8k", {"question": "q", "answer": "work <<1+1=2>>\n#### 1,234"}, ("q", "1234", None)),
        (
            "math",
            {"problem": "q", "solution": r"so $\boxed{\frac{1}{2}}$", "level": "Level 4"},
            ("q", r"\frac{1}{2}", 4),
        ),
        ("math", {"problem": "q", "solution": "no box", "level": "Level ?"}, ("q", None, None)),
        ("math500", {"problem": "q", "answer": "x", "solution": "s", "level": 2}, ("q", "x", 2)),
        ("amc23", {"question": "q", "answer": 27.0}, ("q", 27.0, None)),
        ("aime2024", {"problem": "q", "answer": "204", "solution": "s"}, ("q", "204", None)),
        ("aime2025", {"problem": "q", "answer": "70"}, ("q", "70", None)),
        ("olympiadbench", {"question": "q", "final_answer": ["2", "3"], "solution": ["s"]}, ("q", "2, 3", None)),
        ("minerva", {"question": "q", "answer": "1e-3"}, ("q", "1e-3", None)),
    ],
)
def test_a_row_of_every_set_becomes_a_problem(name, row, expected):
    made = normalised(SETS[name], row)
    assert (made["problem"], made["answer"], made["level"]) == expected


def test_unknown_names_and_splits_are_told():
    with pytest.raises(BadInput, match="gms8k: neither a problem file nor one of gsm8k, math"):
        open_problems("gms8k")
    with pytest.raises(BadInput, match="split 'dev', expected test or train"):
        open_problems("gsm8k:dev")
    with pytest.raises(BadInput, match=r"none\.jsonl: no problem file there"):
        open_problems("none.jsonl")


@pytest.mark.filterwarnings("ignore")
def test_a_set_is_read_by_the_library_that_people_use(tmp_path, monkeypatch):
    """The library takes a directory of the hub's layout for the data set of that name."""
    pytest.importorskip("datasets", reason="datasets is not installed: the extra dev, with `make test`")
    home = tmp_path / "openai" / "gsm8k"
    home.mkdir(parents=True)
    rows = [{"question": f"{i}+1?", "answer": f"add\n#### {i + 1}"} for i in range(3)] + [
        {"question": "?", "answer": ""}
    ]
    for split in ("test", "train"):
        (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("test", "train"))
    (home / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    told: list[str] = []
    problems = open_problems("gsm8k", told.append)
    assert [(p.id, p.problem, p.answer) for p in problems][2] == ("gsm8k/test/3", "2+1?", "3")
    assert told == ["gsm8k: row 4: answer: expected text, got ''"]
    assert open_problems("gsm8k:train", told.append)[0].id == "gsm8k/train/1"


def test_bad_rows_are_told_with_their_lines_and_the_rest_goes_on(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    lines = [{"problem": "a", "answer": "1"}, {"problem": "b"}, {"problem": "c", "answer": 2, "id": "1"}, [1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n" + '{"problem":"d","answer":"4"}\n')
    told: list[str] = []
    assert [p.answer for p in load_problems(path, told.append)] == ["1", "4"]
    assert [line.removeprefix(f"{path}: ") for line in told] == [
        "row 2: answer: expected text, got None",
        "row 3: id '1' occurs twice",
        "row 4: expected an object, got list",
        "row 5: not valid JSON: Expecting property name enclosed in double quotes",
    ]
    with pytest.raises(BadInput, match="row 2: answer"):
        load_problems(path)
