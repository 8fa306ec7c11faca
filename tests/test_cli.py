import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from thinkfast import __version__
from thinkfast.cli import app, main
from thinkfast.data.problems import Problem, dump_problems, load_problems
from thinkfast.data.wordproblems import generate
from thinkfast.errors import line_of
from thinkfast.model.checkpoint import read_config


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    made = generate(3, 4, "held-out", [1])
    path = tmp_path / "problems.jsonl"
    path.write_text(dump_problems([Problem(p.id, p.problem, p.answer, p.level, p.solution) for p in made]))
    return path


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    rows = [
        {"problem": "1+1?", "answer": "2", "completions": ["#### 2", "so \\boxed{2.0}", "#### 3", "no idea"]},
        {"problem": "1/2?", "answer": "1/2", "completions": ["#### 0.5", "#### 1", "#### 1", "#### 1"]},
    ]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_commands_are_these() -> None:
    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert names == {
        "adapt",
        "bench",
        "compare",
        "convert",
        "demo",
        "distill",
        "doctor",
        "export",
        "grade",
        "overlap",
        "plan",
        "rank-layers",
        "report",
        "retain",
        "reward",
        "run",
        "sample",
        "serve",
        "solve",
        "train-reward",
    }


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("frobnicate", "No such command 'frobnicate'."),
        ("run", "Missing argument"),
        ("run --wrong x", "No such option: --wrong"),
        ("run none.toml", "none.toml: no such recipe"),
        ("run . --json", ".: cannot be read as a recipe"),
        ("demo --set sample.sloots=3", "sample.sloots: unknown key, did you mean slots?"),
        ("demo --set sample.n=many", 'sample.n: input should be a valid integer, not "many"'),
        ("demo --set nonsense", "--set nonsense: expected section.key=value"),
        ("convert nowhere out", "nowhere: no such model directory"),
        ("convert bundled out --attention one", "'one': expected whole numbers with commas, e.g. 1,3"),
        ("convert bundled out --init magic", "init: input should be 'attention' or 'random', not \"magic\""),
        ("distill bundled none.jsonl out", "none.jsonl: no such file"),
        ("sample nowhere problems out", "nowhere: no such model directory"),
        ("sample bundled none.jsonl out", "none.jsonl: no problem file there"),
        ("sample . problems out --n 0", "n: input should be greater than or equal to 1, not 0"),
        ("sample . problems out --n ten", "Invalid value for '--n': "),
        ("grade none.jsonl", "none.jsonl: no problem file there"),
        ("grade .", ".: holds no part-*.parquet with samples"),
        ("compare a.jsonl --ks 4,2", "ks [4, 2] are not ascending"),
        ("report nowhere", "nowhere: not a run directory"),
        ("bench nowhere", "nowhere: no such model directory"),
    ],
)
def test_bad_input_is_told_in_one_line_with_status_2(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("thinkfast: ")
    assert told in err
    assert list(tmp_path.iterdir()) == []


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["sample", "--help"]) == 0
    assert capsys.readouterr().out.count("Usage: thinkfast") == 3
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"thinkfast {__version__}\n"


def test_help_is_quick_and_module_runs() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "thinkfast", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert time.monotonic() - started < 5


def test_grade_reads_completions_made_elsewhere(completions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grade", str(completions), "--json", "--out", str(completions.with_suffix(".parquet"))]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == {"problems": 2, "samples": 8, "pass@1": 0.375, "coverage": 1.0, "majority": 0.5}
    assert completions.with_suffix(".parquet").stat().st_size > 0


def test_compare_without_times_ends_at_k(completions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better = completions.with_name("better.jsonl")
    rows = [json.loads(line) for line in completions.read_text().splitlines()]
    better.write_text("".join(json.dumps({**row, "completions": [f"#### {row['answer']}"] * 4}) + "\n" for row in rows))
    assert main(["compare", str(completions), str(better), "--json", "--ks", "1,2,4,8"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["k"] == [1, 2, 4]
    assert document["by_k"]["other"]["coverage"]["mean"] == pytest.approx([0.375, (5 / 6 + 0.5) / 2, 1.0])
    assert document["by_k"]["better"]["majority"]["mean"] == [1.0, 1.0, 1.0]
    assert "wins" not in document
    assert "by_time" not in document


def test_compare_with_times_tells_the_wins(completions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = completions.with_name("slow.jsonl"), completions.with_name("fast.jsonl")
    rows = [
        {"problem": f"{i}?", "answer": "7", "completions": ["#### 7", "#### 8"], "t_end": [30.0, 31.0]}
        for i in range(30)
    ]
    slow.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fast.write_text("".join(json.dumps({**row, "t_end": [3.0, 31.0]}) + "\n" for row in rows))
    assert main(["compare", str(slow), str(fast), "--from", "0.2", "--to", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {win["model"] for win in document["wins"]} == {"fast"}
    assert all(win["from_seconds"] == 0.2 and win["to_seconds"] < 1.0 for win in document["wins"])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"problem": "p", "answer": "1"}, "row 1: completions: expected a list of texts"),
        ({"problem": "p", "completions": []}, "row 1: answer: expected text"),
        ({"problem": "p", "answer": "1", "completions": ["a"], "t_end": []}, "row 1: t_end: expected 1 numbers"),
    ],
)
def test_broken_completions_are_named(
    row: dict[str, object], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    assert main(["grade", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_convert_sample_and_grade_in_a_row(
    tiny_teacher: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, samples = tmp_path / "student", tmp_path / "samples"
    assert main(["convert", str(tiny_teacher), str(student), "--attention", "1", "--data", str(problems)]) == 0
    assert "attention" in capsys.readouterr().out
    assert read_config(student).layer_types == ("mamba", "attention")
    options = ["--n", "2", "--seconds", "20", "--max-tokens", "12", "--slots", "4", "--json"]
    assert main(["sample", str(student), str(problems), str(samples), *options]) == 0
    drawn = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert drawn["samples"] == 2 * len(load_problems(problems))
    assert main(["grade", str(samples), "--problems", str(problems), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == drawn["samples"]
    assert main(["grade", str(samples)]) == 2
    assert "--problems is needed" in capsys.readouterr().err


def test_distill_makes_a_student(
    tiny_teacher: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["align.tokens=300", "distill.tokens=300", "distill.batch_tokens=256", "corpus.held_out=1"]
    options = [word for setting in small for word in ("--set", setting)]
    assert main(["distill", str(tiny_teacher), str(problems), str(tmp_path / "out"), "--json", *options]) == 0
    notes = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert notes["kl"] > 0
    assert notes["train"]["distill"]["tokens"] >= 300
    assert read_config(tmp_path / "out" / "student").layer_types == ("mamba", "mamba")


def test_an_interrupt_ends_with_130_and_says_what_is_kept(tiny_teacher: Path, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    command = [sys.executable, "-m", "thinkfast", "sample", str(tiny_teacher), str(problems), str(out)]
    options = ["--n", "100000", "--seconds", "60", "--max-tokens", "12", "--slots", "4"]
    # Under a shell's & interrupts are ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        while not list(out.glob("part-*.parquet")):
            assert process.poll() is None, "it ended before it was interrupted"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"thinkfast: interrupted; everything finished so far is kept in {out}"


@pytest.mark.parametrize("command", ["sample bundled p.jsonl {}", "convert bundled {}", "demo --out {}"])
def test_a_file_where_a_directory_is_wanted_is_told(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"id": "a", "problem": "Ann has 3 eggs.", "answer": "3"}\n')
    for place in ("p.jsonl", "p.jsonl/below"):
        assert main(shlex.split(command.format(place))) == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith(f"thinkfast: {place}")
        assert "expected a " in err
        assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_what_may_not_be_read_is_told() -> None:
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "set.jsonl")
    assert line_of(refused) == (2, "set.jsonl: Permission denied, expected one that this user may use")
    assert line_of(FileNotFoundError(errno.ENOENT, "gone", "x")) is None, (
        "whose place nobody checked: a mistake of ours"
    )


def test_a_full_disk_ends_with_1_and_one_line(completions: Path) -> None:
    verdicts = completions.with_name("verdicts.parquet")
    command = [sys.executable, "-m", "thinkfast", "grade", str(completions), "--out", str(verdicts)]
    limited = f"ulimit -f 1; exec {shlex.join(command)}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"thinkfast: cannot write {verdicts}: File too large\n"
    assert not verdicts.exists()


def test_doctor_tells_what_is_there_and_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--json"])
    findings = {row["what"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert findings["torch"]["ok"]
    assert findings["memory"]["ok"]
    assert findings["native kernels"]["found"].endswith(".so")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert main(["doctor"]) == 1
    assert "NO  native kernels  " in capsys.readouterr().out


def test_export_writes_plans_and_refuses(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: the extra dev, with `make test`")
    out = tmp_path / "out"
    assert main(["export", str(tiny_teacher), "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["attention_layers"] == 2
    assert main(["export", str(tiny_teacher), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parity"]["logits"] < 1e-4
    for arguments, message in {
        (str(out),): f"{out} exists, expected a new directory",
        (): "OUT is missing, expected where the export goes (or --plan)",
        (str(tmp_path / "x"), "--format", "onnx"): "format is 'onnx', expected one of hf, gguf",
        (str(tmp_path / "x"), "--format", "gguf", "--compat"): "--compat is about transformers, expected the format hf",
    }.items():
        assert main(["export", str(tiny_teacher), *arguments]) == 2
        assert capsys.readouterr().err == f"thinkfast: {message}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
