"""The command line that result files hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thinkfast import runtime

ROOT = Path(__file__).parents[1]
TELL = "from thinkfast import runtime; print(runtime.command())"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["/opt/env/bin/thinkfast", "demo"], "thinkfast demo"),
        (["scripts/measure_workers.py", "MODEL", "--n", "8"], "python scripts/measure_workers.py MODEL --n 8"),
        ([str(ROOT / "benchmarks" / "engine.py"), "--repeats", "3"], "python benchmarks/engine.py --repeats 3"),
        ([str(ROOT / "src" / "thinkfast" / "__main__.py"), "doctor"], "thinkfast doctor"),
        (
            ["/opt/env/bin/thinkfast", "solve", "bundled", "Ann's 3 eggs"],
            """thinkfast solve bundled 'Ann'"'"'s 3 eggs'""",
        ),
        (["thinkfast", "bench", "m", "--contexts", "128,512"], "thinkfast bench m --contexts 128,512"),
    ],
)
def test_a_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch, given: list[str], wanted: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", given)
    assert runtime.command() == wanted


def test_a_script_that_python_runs_tells_its_own_command(tmp_path: Path) -> None:
    folder = tmp_path / "some scripts"
    folder.mkdir()
    (folder / "tell.py").write_text(TELL)
    words = [sys.executable, "some scripts/tell.py", "--out", "two words"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "python 'some scripts/tell.py' --out 'two words'"


def test_no_script_writes_its_command_by_itself() -> None:
    """Result files differ otherwise in what a reader can paste."""
    writers = 0
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]:
        text = path.read_text()
        writers += text.count('"command": runtime.command()') + text.count("records.publish(")
        assert '"command": ' not in text.replace('"command": runtime.command()', ""), path
    assert writers >= 10
