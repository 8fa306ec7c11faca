import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from thinkfast.errors import BadInput
from thinkfast.records import (
    SampleRow,
    ScoreRow,
    append_samples,
    hash_path,
    locked,
    publish,
    read_json,
    read_record,
    read_samples,
    read_scores,
    stage,
    write_bytes,
    write_json,
    write_scores,
)


def sample(problem: str, index: int, text: str = "so 7\n#### 7") -> SampleRow:
    return SampleRow(problem, index, 3, text, 12, "stop", 0.5, 1.25 + index, -3.5, "pure")


def test_a_stage_is_open_then_complete(tmp_path: Path) -> None:
    with stage(tmp_path / "a", name="draw", settings={"n": 3, "deep": {"x": 1.5}}, inputs={"m": "h"}, seed=7) as run:
        assert (run.done, run.resuming) == (False, False)
        on_disk = read_record(tmp_path / "a")
        assert on_disk is not None
        assert (on_disk["status"], on_disk["ended"]) == ("running", None)
        run.note("speed", 12)
    record = read_json(tmp_path / "a" / "run.json")
    assert record["status"] == "complete"
    assert record["ended"] >= record["started"]
    assert record["notes"] == {"speed": 12}
    assert record["settings"] == {"n": 3, "deep": {"x": 1.5}}
    assert {"torch", "python", "numpy"} <= record["versions"].keys()
    assert record["machine"]["cores"] >= 1
    with stage(tmp_path / "a", name="draw", settings={"deep": {"x": 1.5}, "n": 3}, inputs={"m": "h"}, seed=7) as again:
        assert again.done
        assert again.notes == {"speed": 12}
        assert again.hash == record["hash"]
    assert read_json(tmp_path / "a" / "run.json") == record


def test_a_stage_that_failed_goes_on_and_adds_up_its_seconds(tmp_path: Path) -> None:
    def cut_off() -> None:
        with stage(tmp_path, name="s", settings={}) as run:
            run.note("clock", 2.5)
            time.sleep(0.05)
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        cut_off()
    first = read_json(tmp_path / "run.json")
    assert first["status"] == "running"
    with stage(tmp_path, name="s", settings={}) as run:
        assert (run.done, run.resuming) == (False, True)
        assert run.notes == {"clock": 2.5}
    second = read_json(tmp_path / "run.json")
    assert second["started"] == first["started"]
    assert second["seconds"] >= first["seconds"] >= 0.05


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"n": 4, "deep": {"x": 1}}}, "was made with n = 3, not 4"),
        ({"settings": {"n": 3, "deep": {"x": 2}}}, "was made with deep.x = 1, not 2"),
        ({"settings": {"n": 3, "deep": {"x": 1}, "new": "a"}}, 'was made with new = null, not "a"'),
        ({"settings": {"n": 3}}, "was made with deep.x = 1, not null"),
        ({"inputs": {"model": "other"}}, "was made from another model"),
        ({"seed": 8}, "was made with seed = 7, not 8"),
        ({"name": "grade"}, "holds the stage 'draw', not 'grade'"),
    ],
)
def test_another_stage_is_refused_with_what_differs(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    same = {"name": "draw", "settings": {"n": 3, "deep": {"x": 1}}, "inputs": {"model": "h"}, "seed": 7}
    with stage(tmp_path, **same):
        pass
    with pytest.raises(BadInput) as caught, stage(tmp_path, **{**same, **changed}):
        pass
    assert str(caught.value) == f"{tmp_path}: {message}; remove it or choose another directory"


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(BadInput, match=r"holds files but no run\.json"), stage(tmp_path, name="s", settings={}):
        pass
    with pytest.raises(BadInput, match="is a file"), stage(tmp_path / "thesis.tex", name="s", settings={}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", "[]", '{"hash": 1}'])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadInput, match=r"run\.json: not"), stage(tmp_path, name="s", settings={}):
        pass


def test_json_refuses_what_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"kl": math.nan})
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="no such file"):
        read_json(tmp_path / "a.json")


WRITER = """
import sys
from pathlib import Path
from thinkfast.records import SampleRow, append_samples, write_json
folder, part = Path(sys.argv[1]), 0
while True:
    write_json(folder / "doc.json", {"n": part, "body": [part] * 50_000})
    rows = [SampleRow(f"p{part}", i, 0, "x" * 500, 1, "stop", 0.0, 1.0, 0.0, "m") for i in range(20)]
    append_samples(folder, rows)
    part += 1
    if part == 2:
        print("ready", flush=True)
"""


def test_killed_at_any_moment_files_are_old_or_new_and_never_half(tmp_path: Path) -> None:
    chance, seen = random.Random(5), 0
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0.02, 0.2))
            process.send_signal(signal.SIGKILL)
        document = tmp_path / "doc.json"
        if document.exists():
            body = json.loads(document.read_text())
            assert body["body"] == [body["n"]] * 50_000
        for part in tmp_path.glob("part-*.parquet"):
            single = part.parent / "alone"
            single.mkdir()
            part.rename(single / part.name)
            assert len(read_samples(single)) == 20
            (single / part.name).unlink()
            single.rmdir()
            seen += 1
    assert seen > 0


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from thinkfast.records import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
write_bytes(Path({str(tmp_path / "old.bin")!r}), b"x" * 100_000)
"""
    write_bytes(tmp_path / "old.bin", b"old")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"File too large: '{tmp_path / 'old.bin'}'" in done.stderr
    assert (tmp_path / "old.bin").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.bin"]


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    first, second = [sample("a", 0), sample("b", 0, "ünïcode 🎲")], [sample("a", 1, "")]
    assert append_samples(tmp_path, first).name == "part-00000.parquet"
    assert append_samples(tmp_path, second).name == "part-00001.parquet"
    (tmp_path / ".part-00002.parquet.tmp").write_bytes(b"half")
    assert read_samples(tmp_path) == first + second


def test_a_sample_drawn_twice_is_refused(tmp_path: Path) -> None:
    append_samples(tmp_path, [sample("a", 0), sample("a", 1)])
    append_samples(tmp_path, [sample("a", 1, "another text")])
    with pytest.raises(BadInput, match=r"part-00001\.parquet: holds sample 1 of problem a a second time"):
        read_samples(tmp_path)


def test_broken_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadInput, match=r"part-00000\.parquet: not a table of SampleRow"):
        read_samples(tmp_path)
    write_scores(tmp_path / "part-00000.parquet", [ScoreRow("a", 0, "7", 0, True)])
    with pytest.raises(BadInput, match=r"part-00000\.parquet: lacks the column 'seed'"):
        read_samples(tmp_path)


def test_scores_keep_missing_answers(tmp_path: Path) -> None:
    rows = [ScoreRow("a", 0, "7", 0, True), ScoreRow("a", 1, None, -1, False)]
    write_scores(tmp_path / "pure.parquet", rows)
    assert read_scores(tmp_path / "pure.parquet") == rows
    with pytest.raises(BadInput, match="no such file"):
        read_scores(tmp_path / "none.parquet")


def test_hashes_follow_content_and_names_and_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "m"
    write_bytes(model / "config.json", b"{}")
    write_bytes(model / "deep" / "w.bin", b"1")
    before = hash_path(model)
    write_json(model / "run.json", {"started": "now"})
    os.utime(model / "config.json", (0, 0))
    assert hash_path(model) == before
    write_bytes(model / "deep" / "w.bin", b"2")
    changed = hash_path(model)
    (model / "config.json").rename(model / "other.json")
    assert len({before, changed, hash_path(model)}) == 3
    with pytest.raises(BadInput, match="no such file or directory"):
        hash_path(tmp_path / "none")


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    program = (
        f"from pathlib import Path\nfrom thinkfast.records import locked\n"
        f"with locked(Path({str(tmp_path)!r})): print('in')\n"
    )
    with locked(tmp_path):
        refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "another thinkfast is working here" in refused.stderr
    allowed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert allowed.stdout == "in\n"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """Nor is a device: root could replace /dev/null for everybody."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(60)
    assert json.loads(read[0]) == {"a": 1}
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_published_figures_say_how_they_came_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish({"ratio": 2.15}, None)
    publish({"ratio": 2.15}, tmp_path / "figures" / "ratio.json")
    stored = json.loads((tmp_path / "figures" / "ratio.json").read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [stored, stored]
    assert list(stored) == ["ratio", "command", "code", "machine"]
    assert stored["command"]
    assert stored["machine"]["cores"] >= 1
