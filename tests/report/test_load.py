import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinkfast.errors import BadInput
from thinkfast.records import read_samples, read_scores
from thinkfast.report.load import load_run

MakeRun = Callable[..., Path]


def _change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_totals_agree_with_the_files(demo_run: Path) -> None:
    run = load_run(demo_run, 10)
    assert [problem.id for problem in run.problems] == [f"demo-{4 * i:04d}" for i in range(10)]
    samples = read_samples(demo_run / "samples" / "pure")
    right = {(s.problem_id, s.sample_index): s.correct for s in read_scores(demo_run / "scores" / "pure.parquet")}
    pure = run.sampled["pure"]
    assert pure.samples == len(samples) == 40 * 64
    assert pure.pass_at_1 == pytest.approx(sum(right.values()) / len(right))
    assert pure.mean_tokens == pytest.approx(sum(s.token_count for s in samples) / len(samples))
    assert pure.tokens_per_second == pytest.approx(sum(s.token_count for s in samples) / max(s.t_end for s in samples))
    assert pure.cut == pytest.approx(sum(s.finish_reason == "length" for s in samples) / len(samples))
    shown = pure.shown["demo-0004"]
    assert len(shown) == 64
    assert [s.row.t_end for s in shown] == sorted(s.row.t_end for s in shown)
    assert all(s.grade.correct == right[s.row.problem_id, s.row.sample_index] for s in shown)


def test_what_may_be_absent(make_run: MakeRun) -> None:
    run_dir = make_run()
    for name in ("summary.json", "bench.json", "models/pure/plan.json", "samples/teacher/run.json"):
        (run_dir / name).unlink()
    run = load_run(run_dir, 60)
    assert (run.summary.models, run.bench, run.record, list(run.plans)) == ({}, [], {}, ["hybrid"])
    assert len(run.problems) == 6


CURVES = "curves/curves.json"
WIN = {"metric": "coverage", "from_seconds": 0.1, "to_seconds": 0.2, "difference": 0.1, "low": 0.05, "high": 0.15}
BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "missing": (CURVES, lambda d: d.pop("k"), "k: field is missing"),
    "deep": (CURVES, lambda d: d["by_time"]["pure"]["coverage"].pop("mean"), "by_time.pure.coverage.mean: field is"),
    "length": (CURVES, lambda d: d["by_time"]["pure"]["majority"]["low"].pop(), "by_time.pure.majority.low: 15 values"),
    "band": (CURVES, lambda d: d["difference"]["pure"]["coverage"].pop("band_low"), "pure.coverage.band_low: field is"),
    "samples": (
        CURVES,
        lambda d: d["by_time"]["pure"]["samples"].pop(),
        "by_time.pure.samples: 15 values",
    ),
    "model": (CURVES, lambda d: d["by_k"].pop("hybrid"), "by_k.hybrid: field is missing"),
    "baseline": (CURVES, lambda d: d.update(baseline="gpt"), "baseline: 'gpt' is not one of"),
    "grid": (CURVES, lambda d: d["seconds"].reverse(), "seconds: expected positive numbers that increase"),
    "win": (CURVES, lambda d: d["wins"].append(WIN | {"model": "teacher"}), "unknown student 'teacher'"),
    "type": (CURVES, lambda d: d.update(problems="many"), "problems: Input should be a valid integer"),
    "plan": ("models/pure/plan.json", lambda d: d["layers"][2].pop("student"), "layers.2.student: field is missing"),
    "stages": ("summary.json", lambda d: d["stages"].update(sample="slow"), "stages.sample: Input should be a valid"),
    "bench": ("bench.json", lambda d: d["rows"][3].pop("context"), "rows.3.context: field is missing"),
    "bench rows": ("bench.json", lambda d: d.pop("rows"), "rows: expected a list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_field_is_named(make_run: MakeRun, case: str) -> None:
    name, change, complaint = BROKEN[case]
    run_dir = make_run()
    _change(run_dir / name, change)
    with pytest.raises(BadInput) as caught:
        load_run(run_dir, 60)
    message = str(caught.value)
    assert message.startswith(str(run_dir / name))
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize("name", [CURVES, "problems/problems.jsonl", "scores/hybrid.parquet"])
def test_a_missing_file_is_named(make_run: MakeRun, name: str) -> None:
    run_dir = make_run()
    (run_dir / name).unlink()
    with pytest.raises(BadInput, match=name):
        load_run(run_dir, 60)


def test_ungraded_samples_are_named(make_run: MakeRun) -> None:
    run_dir = make_run()
    (run_dir / "scores" / "pure.parquet").write_bytes((run_dir / "scores" / "teacher.parquet").read_bytes())
    with pytest.raises(BadInput, match=r"scores/pure\.parquet: no row for sample 32 of problem demo-0000"):
        load_run(run_dir, 60)
    for part in (run_dir / "samples" / "teacher").glob("part-*"):
        part.unlink()
    with pytest.raises(BadInput, match=r"samples/teacher: no samples of model 'teacher'"):
        load_run(run_dir, 60)


def test_unusable_arguments(demo_run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a run directory"):
        load_run(tmp_path / "nothing", 60)
    with pytest.raises(BadInput, match="shown = 0"):
        load_run(demo_run, 0)
