import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinkfast.report import words
from thinkfast.report.load import Run, load_run

MakeRun = Callable[..., Path]


def _changed(run_dir: Path, name: str, change: Callable[[Any], object]) -> Run:
    path = run_dir / name
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return load_run(run_dir, 2)


def _flat(text: str) -> str:
    return text.replace("\u00a0", " ")


def _set_win(document: dict[str, Any], metric: str, low: float, at: int, model: str = "pure") -> None:
    for name, share in (("teacher", 0.631), (model, 0.712)):
        document["by_time"][name][metric]["mean"][at] = share
    grid = document["seconds"]
    document["wins"].append(
        {
            "model": model,
            "metric": metric,
            "from_seconds": grid[at - 1],
            "to_seconds": grid[at + 2],
            "at_seconds": grid[at],
            "difference": 0.081,
            "low": low,
            "high": 0.15,
        }
    )


def test_the_headline_is_the_win_with_the_highest_lower_band(make_run: MakeRun) -> None:
    def change(document: dict[str, Any]) -> None:
        document["wins"] = []
        _set_win(document, "coverage", low=0.01, at=3)
        _set_win(document, "majority", low=0.021, at=8)
        _set_win(document, "coverage", low=0.02, at=10, model="hybrid")

    found = words.headline(_changed(make_run(), "curves/curves.json", change))
    assert _flat(found.sentence) == (
        "In 0.317 s per problem the pure Mamba student answers 71 % of the problems by majority vote, "
        "its Transformer teacher 63 %."
    )
    assert "+8.1 percentage points, 95 % band [+2.1, +15.0]" in _flat(found.evidence)
    assert "from 0.252 s to 0.504 s" in _flat(found.evidence)
    assert (found.won, found.metric, found.model, found.seconds) == (True, "majority", "pure", 0.317)


def test_without_a_win_the_headline_says_so(make_run: MakeRun) -> None:
    def change(document: dict[str, Any]) -> None:
        document["wins"] = []
        for model in ("pure", "hybrid"):
            for metric in ("coverage", "majority"):
                document["difference"][model][metric]["mean"] = [-0.3] * 16
        best = document["difference"]["hybrid"]["coverage"]
        best["mean"][5], best["band_low"][5], best["band_high"][5] = 0.024, -0.05, 0.1

    found = words.headline(_changed(make_run(), "curves/curves.json", change))
    assert found.sentence == "At no measured budget is a student shown to be ahead of its Transformer teacher."
    assert _flat(found.evidence).startswith("The largest lead is +2.4 percentage points by coverage, of hybrid at ")
    assert "95 % band [−5.0, +10.0]" in _flat(found.evidence)
    assert (found.won, found.model) == (False, "hybrid")


def test_where_the_teacher_is_ahead_is_said(make_run: MakeRun) -> None:
    def change(document: dict[str, Any]) -> None:
        for model in ("pure", "hybrid"):
            for metric in ("coverage", "majority"):
                curve = document["difference"][model][metric]
                curve["band_low"], curve["band_high"] = [-0.2] * 16, [0.2] * 16
        curve = document["difference"]["pure"]["majority"]
        curve["band_high"][:3] = [-0.01] * 3
        curve["band_low"][10] = curve["band_low"][12] = curve["band_low"][13] = 0.02

    said = [_flat(text) for text in words.budgets(_changed(make_run(), "curves/curves.json", change))]
    assert said[0] == "By coverage, neither pure nor the teacher is ahead at any budget."
    assert said[1] == (
        "By majority vote, pure is ahead at 0.504 s and from 0.8 s to 1.01 s; "
        "the teacher is ahead of pure from 0.05 s to 0.079 s."
    )
    assert len(said) == 4


@pytest.mark.parametrize(
    ("teacher", "pure", "expected"),
    [
        # log ratio +ln 2 at 100 and −ln 2 at 400: zero at their geometric mean
        ((200, 50), (100, 100), "At batch 8 the teacher decodes faster than pure below a context of about 200 tokens"),
        ((50, 200), (100, 100), "At batch 8 the teacher decodes faster than pure above a context of about 200 tokens"),
        ((300, 200), (100, 100), "At batch 8 the teacher decodes faster than pure at every measured context"),
        ((30, 20), (100, 100), "At batch 8 pure decodes faster than the teacher at every measured context"),
    ],
)
def test_the_crossing_of_speeds(
    make_run: MakeRun, teacher: tuple[int, int], pure: tuple[int, int], expected: str
) -> None:
    rows = [
        {"model": model, "batch": 8, "context": context, "tokens_per_second": speed}
        for model, speeds in (("teacher", teacher), ("pure", pure), ("hybrid", pure))
        for context, speed in zip((100, 400), speeds, strict=True)
    ]
    run_dir = make_run()
    (run_dir / "bench.json").write_text(json.dumps(rows))
    said = words.speed(load_run(run_dir, 2))
    assert said[0].startswith(expected)
    assert f"at 400 tokens pure runs at {100 / teacher[1]:.2g} times its speed." in said[0]


def test_kinds_follow_the_plans(make_run: MakeRun) -> None:
    run_dir = make_run()
    run = load_run(run_dir, 2)
    kinds = [words.kind(run, model) for model in ("teacher", "pure", "hybrid")]
    assert kinds == ["Transformer teacher", "pure Mamba student", "hybrid student"]
    for model in ("pure", "hybrid"):
        (run_dir / "models" / model / "plan.json").unlink()
    bare = load_run(run_dir, 2)
    assert [words.kind(bare, model) for model in ("teacher", "pure")] == ["teacher", "student"]


def test_numbers_in_words() -> None:
    told = [words.seconds(0.6), words.seconds(89.0), words.seconds(120.0), words.seconds(7200.0)]
    assert [_flat(text) for text in told] == ["0.6 s", "89 s", "2.0 min", "2.0 h"]
    assert [words.points(0.0812), words.points(-0.004), words.points(0.0)] == ["+8.1", "−0.4", "0.0"]
    assert [_flat(words.count(n)) for n in (None, 1234, 5_400_000)] == ["–", "1,234", "5.4 M"]
    assert [_flat(words.percent(v)) for v in (0.7149, None, float("nan"))] == ["71 %", "–", "–"]
