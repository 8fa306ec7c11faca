"""`thinkfast solve`, as it is typed."""

import io
import json
import shlex
from pathlib import Path

import pytest

from thinkfast.cli import main
from thinkfast.errors import BadInput
from thinkfast.serve.draw import seconds_of
from thinkfast.serve.terminal import in_words, read_texts


def test_an_answer_in_time(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--budget", "30s", "--n", "60", "--slots", "8", "--json"]
    assert main(["solve", str(talker), "Ada has 3 pens.", *options]) == 0
    line, document = capsys.readouterr().out.splitlines()
    found = json.loads(document)
    assert found["answer"] == "7"
    assert found["problem"] == "Ada has 3 pens."
    assert found["chain"].endswith("#### 7")
    assert 0.5 < found["confidence"] < 1
    assert found["samples"] == sum(row["votes"] for row in found["votes"])
    assert line.startswith(f"7  ({found['confidence']:.0%} of the votes, {found['samples']} samples, ")
    assert line.endswith(("all 60 are drawn)", "no more of 60 can change it)", "time is up)", "would end in time)"))


def test_the_budget_is_kept(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(talker), "Ada has 3 pens.", "--budget", "1s", "--slots", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] < 2.0


@pytest.mark.parametrize(
    ("strategy", "stopped", "told"),
    [
        ("majority", "deadline", "7  (80% of the votes, 5 samples, 1.25 s: time is up)"),
        ("best_of_n", "deadline", "7  (80% of the votes, 5 samples, 1.25 s: no other chain would end in time)"),
        ("majority", "samples", "7  (80% of the votes, 5 samples, 1.25 s: all 9 are drawn)"),
        ("majority", "decided", "7  (80% of the votes, 5 samples, 1.25 s: no more of 9 can change it)"),
        ("adaptive", "decided", "7  (80% of the votes, 5 samples, 1.25 s: the vote is decided)"),
        ("weighted", "closed", "7  (80% of the weight, 5 samples, 1.25 s: stopped)"),
    ],
)
def test_only_what_is_decided_is_called_so(strategy: str, stopped: str, told: str) -> None:
    found = {"answer": "7", "confidence": 0.8, "samples": 5, "seconds": 1.25}
    budget = 2.0 if strategy == "best_of_n" else 1.3
    assert in_words({**found, "strategy": strategy, "stopped": stopped}, 9, budget) == told


def test_no_answer_in_time(rambler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(rambler), "Ada has 3 pens.", "--budget", "200ms", "--n", "1000000"]) == 0
    assert capsys.readouterr().out.startswith("no answer: ")


def test_problems_from_a_file_and_from_stdin(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "one pen"}\n\n{"problem": "two pens", "answer": "2"}\n')
    options = ["--budget", "10s", "--strategy", "adaptive", "--json", "--slots", "8"]
    assert main(["solve", str(talker), "--problems", str(path), *options]) == 0
    *lines, document = capsys.readouterr().out.splitlines()
    assert [row["problem"] for row in json.loads(document)] == ["one pen", "two pens"]
    assert [row["stopped"] for row in json.loads(document)] == ["decided", "decided"]
    assert len(lines) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("three pens\n\nfour pens\n"))
    assert main(["solve", str(talker), "-", *options]) == 0
    assert [row["problem"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])] == [
        "three pens",
        "four pens",
    ]


def test_the_seed_fixes_the_chains(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chains = []
    for seed in (1, 1, 2):
        assert main(["solve", str(talker), "x", "--n", "3", "--seed", str(seed), "--json", "--budget", "30s"]) == 0
        chains.append(json.loads(capsys.readouterr().out.splitlines()[-1])["votes"])
    assert chains[0] == chains[1] != chains[2]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("solve nowhere x", "nowhere: no such model directory"),
        ("solve . x", "config.json"),
        ("solve bundled x --budget soon", "budget is 'soon', expected a duration like 5s, 500ms or 2m"),
        ("solve bundled x --budget -1s", "budget is '-1s'"),
        ("solve bundled x --strategy luck", "strategy is 'luck', expected one of"),
        ("solve bundled x --slots 0", "slots is 0, expected 1 or more"),
        ("solve bundled x --temperature -1", "temperature is -1.0"),
        ("solve bundled x --problems y", "expected one of them"),
        ("solve bundled --problems none.jsonl", "none.jsonl: no problem file there"),
        ("solve bundled ''", "no problem given"),
        ("serve nowhere", "nowhere: no such model directory"),
        ("serve . --port 0", "config.json"),
        ("serve bundled --host 0.0.0.0", "can be reached from other machines: expected --keys FILE with API keys"),
        ("serve bundled --host nowhere.invalid", "host 'nowhere.invalid'"),
        ("serve bundled --port 70000", "port is 70000, expected 0 (any) to 65535"),
        ("serve bundled --keys none.toml", "none.toml: no key file there"),
        ("serve bundled --max-budget x", "budget is 'x'"),
        ("serve bundled bundled --port 0", "model name 'teacher' occurs twice"),
    ],
)
def test_bad_input_is_one_line(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.splitlines()[-1].startswith("thinkfast: ")


@pytest.mark.parametrize(
    ("text", "seconds"), [("5s", 5.0), ("500ms", 0.5), ("2m", 120.0), ("1.5", 1.5), (".25s", 0.25), ("1e1s", 10.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "0s", "nan", "infs", "5 hours", "-1", "1e9s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(BadInput, match="expected a duration"):
        seconds_of(text)


def test_rows_that_are_no_problems(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for text, told in (("{", "row 1: not valid JSON"), ('\n{"problem": 3}', "row 2: problem: expected text, got 3")):
        path.write_text(text)
        with pytest.raises(BadInput, match=told):
            read_texts(None, path)
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\n")
    assert read_texts(None, path) == ["one", "two"]
