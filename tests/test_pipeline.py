import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thinkfast import records
from thinkfast.data.corpus import Corpus
from thinkfast.distill.trainer import evaluate_kl
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, read_config
from thinkfast.pipeline import run_recipe
from thinkfast.recipe import Recipe, dump_recipe, parse_recipe


def recipe(path: Path, **changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "teacher": {"path": str(path)},
        "problems": {"count": 6, "levels": [1]},
        "corpus": {"problems": 60, "levels": [1], "held_out": 8},
        "align": {"tokens": 3000, "lr": 1e-3, "batch_tokens": 1024},
        "distill": {"tokens": 4000, "lr": 1e-3, "batch_tokens": 1024},
        "student": [{"name": "pure"}, {"name": "hybrid", "attention": [0]}],
        "sample": {"n": 4, "seconds": 30, "max_tokens": 24, "slots": [4, 8], "trial_seconds": 0.05},
        "bench": {"batches": [2], "contexts": [48, 64]},
        "compare": {"grid": {"first": 0.0005, "last": 0.01, "points": 5}, "ks": [1, 2, 4], "replicates": 50},
        "report": {"problems": 3},
    }
    return parse_recipe({**raw, **changes}, "test")


@pytest.fixture(scope="module")
def finished(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    lines: list[str] = []
    return out, run_recipe(recipe(tiny_teacher), out, lines.append), lines


Finished = tuple[Path, dict[str, Any], list[str]]


def test_a_run_leaves_what_the_contract_says(finished: Finished) -> None:
    out, summary, lines = finished
    for file in ("recipe.toml", "problems/problems.jsonl", "curves/curves.json", "report/index.html", "summary.json"):
        assert (out / file).stat().st_size > 0, file
    assert json.loads((out / "summary.json").read_text()) == summary
    assert list(summary["models"]) == ["teacher", "pure", "hybrid"]
    assert sum(summary["stages"].values()) == pytest.approx(summary["seconds"], abs=0.01)
    assert [line.split("  ")[0].strip() for line in lines] == list(summary["stages"])
    for directory in (
        "problems",
        "corpus",
        "scores",
        "curves",
        "report",
        "models/teacher",
        "models/pure",
        "samples/pure",
    ):
        record = records.read_record(out / directory)
        assert record is not None, directory
        assert record["status"] == "complete", directory


def test_students_are_stock_checkpoints_that_have_learned(finished: Finished) -> None:
    out, summary, _ = finished
    assert read_config(out / "models" / "pure").layer_types == ("mamba", "mamba")
    assert read_config(out / "models" / "hybrid").layer_types == ("attention", "mamba")
    for name in ("pure", "hybrid"):
        row = summary["models"][name]
        corpus = Corpus(out / "corpus")
        unseen = corpus.slice(len(corpus) - 8, len(corpus))
        models = [load_model(out / "models" / which) for which in ("teacher", name)]
        assert row["kl"] == pytest.approx(evaluate_kl(models[0], models[1], unseen), rel=1e-3)
        assert row["kl"] > 0
        assert row["train_tokens"] >= 7000
        assert not list((out / "models" / name).glob("*.state"))
        stages = [json.loads(line) for line in (out / "models" / name / "metrics.jsonl").read_text().splitlines()]
        align = [row["loss"] for row in stages if row["stage"] == "align"]
        assert align[-1] < align[0]
    assert summary["models"]["teacher"]["kl"] == 0.0


def test_every_sample_is_stored_and_graded_once(finished: Finished) -> None:
    out, summary, _ = finished
    for name, row in summary["models"].items():
        samples = records.read_samples(out / "samples" / name)
        scores = records.read_scores(out / "scores" / f"{name}.parquet")
        assert {(s.problem_id, s.sample_index) for s in samples} == {(s.problem_id, s.sample_index) for s in scores}
        assert len(samples) == row["samples"] == 6 * 4
        assert row["tokens_per_second"] == pytest.approx(
            sum(s.token_count for s in samples) / max(s.t_end for s in samples)
        )
        assert row["slots"] in (4, 8)
        assert all(s.t_start <= s.t_end and s.model == name for s in samples)


def test_a_second_run_keeps_everything(finished: Finished, tiny_teacher: Path) -> None:
    out, summary, _ = finished
    times = {
        path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name not in ("summary.json", "recipe.toml")
    }
    lines: list[str] = []
    again = run_recipe(recipe(tiny_teacher), out, lines.append)
    assert again == summary
    assert all("(done before)" in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_other_settings_are_refused_by_the_stage_they_touch(finished: Finished, tiny_teacher: Path) -> None:
    out, _, _ = finished
    before = (out / "recipe.toml").read_text()
    changed = recipe(tiny_teacher, distill={"tokens": 5000, "lr": 1e-3, "batch_tokens": 1024})
    changed = changed.model_copy(
        update={"student": tuple(s.model_copy(update={"distill": changed.distill}) for s in changed.student)}
    )
    with pytest.raises(BadInput, match=r"models/pure: was made with distill\.tokens = 4000, not 5000; remove it"):
        run_recipe(changed, out, lambda _: None)
    assert (out / "recipe.toml").read_text() == before


KILLED = """
import os, signal, sys, torch
from contextlib import contextmanager
from pathlib import Path
from thinkfast import progress
from thinkfast.pipeline import run_recipe
from thinkfast.recipe import load_recipe

@contextmanager
def deadly_bar(title, total):
    def update(done, text=""):
        if title == "pure: distill" and done > 1500:
            os.kill(os.getpid(), signal.SIGKILL)
    yield update

torch.set_num_threads(1)
progress.bar = deadly_bar
run_recipe(load_recipe(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_run_killed_in_training_ends_as_the_whole_one(finished: Finished, tiny_teacher: Path, tmp_path: Path) -> None:
    """The student that goes on from a saved state has the weights of the one that was trained at a stretch."""
    out, _, _ = finished
    file, again = tmp_path / "r.toml", tmp_path / "again"
    file.write_text(dump_recipe(recipe(tiny_teacher)))
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), str(again)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (again / "models" / "pure" / "align.state").exists()
    record = records.read_record(again / "models" / "pure")
    assert record is not None
    assert record["status"] == "running"
    lines: list[str] = []
    run_recipe(recipe(tiny_teacher), again, lines.append)
    assert ["(done before)" in line for line in lines[:4]] == [True, True, True, False]
    weights = "models/pure/model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"path": "nowhere"}}, "nowhere: no such model directory"),
        ({"student": [{"name": "x", "attention": [7]}]}, "student x: .*7 is out of range"),
        ({"sample": {"max_tokens": 510, "seconds": 30}}, "sample.max_tokens 510: the longest prompt leaves room for"),
        ({"corpus": {"problems": 5, "levels": [1], "held_out": 5}}, "corpus.held_out 5: expected fewer than"),
        ({"problems": {"count": 2, "levels": [99]}}, r"levels \[99\]"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    tiny_teacher: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run_recipe(recipe(tiny_teacher, **changes), tmp_path / "run", lambda _: None)
    assert not (tmp_path / "run" / "models" / "pure").exists()
