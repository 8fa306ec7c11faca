"""What users get wrong with problem sets, samples and rewards, through the real command line: one line, status 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinkfast import records
from thinkfast.cli import main
from thinkfast.records import RewardRow, SampleRow

GOOD = {"id": "a", "problem": "Ava has 5 eggs. How many eggs does Ava have?", "answer": "5"}
Refused = Callable[..., None]


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must end with status 2 and one line that holds all of `parts`."""

    def run(command: list[str], *parts: str) -> None:
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert err.startswith("thinkfast: ")
        assert all(part in err for part in parts), err
        assert "Traceback" not in out + err

    return run


SETS = {
    "empty": ((), ("no problems in it",)),
    "blank": (("",), ("no problems in it",)),
    "twice": ((GOOD, {**GOOD, "problem": "another"}), ("row 2", "id 'a' occurs twice")),
    "no answer": ((GOOD, {"id": "b", "problem": "x"}), ("row 2: answer: expected text, got None",)),
    "empty answer": (({**GOOD, "answer": " "},), ("row 1: answer", "' '")),
    "no problem": (({"answer": "5"},), ("row 1: problem: expected text",)),
    "not JSON": ((GOOD, "{broken"), ("row 2: not valid JSON",)),
    "not an object": ((GOOD, "[1]"), ("row 2: expected an object, got list",)),
}


@pytest.mark.parametrize("case", SETS)
def test_problem_sets(case: str, tiny_teacher: Path, tmp_path: Path, refused: Refused) -> None:
    rows, parts = SETS[case]
    file = lines(tmp_path / "set.jsonl", *rows)
    refused(["sample", str(tiny_teacher), file, str(tmp_path / "out")], file, *parts)
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_told_and_the_rest_goes_on_when_asked(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [{**GOOD, "id": str(number)} for number in range(2000)]
    rows: list[Any] = [*made[:1200], "{broken", *made[1200:], {**GOOD, "id": "7"}, {"id": "x", "problem": "y"}]
    file = lines(tmp_path / "large.jsonl", *rows)
    command = ["sample", str(tiny_teacher), file, str(tmp_path / "out"), "--n", "1", "--max-tokens", "1", "--json"]
    assert main(command) == 2
    assert "row 1201" in capsys.readouterr().err
    assert main([*command, "--skip-bad", "--slots", "64"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["samples"] == 2000
    told = [line for line in err.splitlines() if line.startswith(file)]
    assert [line.split(": ")[1] for line in told] == ["row 1201", "row 2002", "row 2003"]


def test_samples_of_another_set(tiny_teacher: Path, tmp_path: Path, refused: Refused) -> None:
    row = SampleRow("strange", 0, 0, "#### 5", 3, "stop", 0.0, 1.0, -1.0, "m")
    records.append_samples(tmp_path / "samples", [row])
    file = lines(tmp_path / "set.jsonl", GOOD)
    for command in ("grade", "compare", "plan", "adapt"):
        refused([command, str(tmp_path / "samples"), "--problems", file], "'strange'", file)
    refused(["grade", str(tmp_path / "samples")], "--problems is needed")
    refused(["grade", str(tmp_path)], "holds no part-*.parquet with samples")
    other = lines(tmp_path / "other.jsonl", {**GOOD, "answer": "6", "completions": ["#### 6"]})
    mine = lines(tmp_path / "mine.jsonl", {**GOOD, "completions": ["#### 5"]})
    refused(["compare", mine, other], "other.jsonl: its problems are not those of")
    refused(["compare", mine, mine], "two sources are called 'mine'")


COMPLETIONS = {
    "none": ({}, "completions: expected a list of texts"),
    "a text": ({"completions": "#### 5"}, "completions: expected a list of texts"),
    "a number in it": ({"completions": ["#### 5", 5]}, "completions: expected a list of texts"),
    "times too few": ({"completions": ["a", "b"], "t_end": [1.0]}, "t_end: expected 2 numbers of seconds"),
    "no answers": ({"completions": ["a"], "answer": None}, "answer: expected text, got None"),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completions(case: str, tmp_path: Path, refused: Refused) -> None:
    row, part = COMPLETIONS[case]
    file = lines(tmp_path / "made.jsonl", {**GOOD, "completions": ["#### 5"]}, {**GOOD, "id": "b", **row})
    refused(["grade", file], file, "row 2", part)


def test_rewards_that_do_not_belong(tiny_teacher: Path, tmp_path: Path, refused: Refused) -> None:
    file = lines(tmp_path / "made.jsonl", {**GOOD, "completions": ["#### 5", "#### 6"], "t_end": [1.0, 2.0]})
    records.append_rows(tmp_path / "rewards", [RewardRow("a", 0, 1.0, "[]", 0.1)], RewardRow)
    refused(["compare", file, "--rewards", str(tmp_path / "rewards")], "no reward for sample 1 of problem a")
    refused(["compare", file, "--open-ended"], "0 directories of rewards for 1 sources")
    refused(["reward", str(tiny_teacher), file, str(tmp_path / "r"), "--how", "best"], "how = 'best'")
    refused(["reward", str(tiny_teacher), file, str(tmp_path / "r"), "--layout", "magic"], "layout 'magic'")


def test_a_reward_model_with_another_tokenizer(tiny_teacher: Path, tmp_path: Path, refused: Refused) -> None:
    """A longer vocabulary than the model has rows: the tokenizer is some other model's."""
    shutil.copytree(tiny_teacher, tmp_path / "model")
    document = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"more{index}": len(vocabulary) + index for index in range(500)}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(document))
    file = lines(tmp_path / "made.jsonl", {**GOOD, "completions": ["#### 5"]})
    refused(["reward", str(tmp_path / "model"), file, str(tmp_path / "out")], "the tokenizer has more tokens")
    assert not list((tmp_path / "out").glob("part-*"))
    records.write_json(tmp_path / "model" / "verifier.json", {})
    records.write_bytes(tmp_path / "model" / "verifier.safetensors", b"")
    refused(["reward", str(tmp_path / "model"), file, str(tmp_path / "out2")], "the tokenizer has more tokens")
