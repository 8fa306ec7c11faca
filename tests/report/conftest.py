"""A seeded run directory as the pipeline leaves it: three models, problems, samples on a clock, curves from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thinkfast.records import (
    RewardRow,
    SampleRow,
    ScoreRow,
    append_rows,
    append_samples,
    read_samples,
    read_scores,
    write_scores,
)
from thinkfast.scale import budget
from thinkfast.scale.budget import Table

# model: (probability of a right chain relative to the teacher's, seconds per chain and problem, samples)
MODELS = {"teacher": (1.0, 0.062, 32), "pure": (0.97, 0.024, 64), "hybrid": (0.99, 0.034, 56)}
SECONDS = [round(float(t), 3) for t in np.geomspace(0.05, 1.6, 16)]
KS = [1, 2, 4, 8, 16, 32]
THINGS = ["marbles", "apples", "stamps", "shells", "beads", "coins", "pencils", "tickets"]
PEOPLE = ["Mira", "Tom", "Ada", "Noor", "Luis", "Ines", "Jonas", "Wei"]


def _word_problem(rng: np.random.Generator, index: int) -> dict[str, Any]:
    who, other = rng.choice(PEOPLE, 2, replace=False)
    thing, first, more, times = rng.choice(THINGS), *(int(v) for v in rng.integers(2, 19, 3))
    answer = first * times + more
    return {
        "id": f"demo-{index:04d}",
        "problem": f"{who} has {first} {thing}. {other} has {times} times as many as {who}, and then gets {more} more. "
        f"How many {thing} does {other} have now?",
        "answer": str(answer),
        "level": 1 + index % 4,
        "solution": f"{first} times {times} is {first * times}; plus {more} is {answer}.",
        "_parts": (who, other, thing, first, times, more),
    }


def _chain(parts: tuple[Any, ...], wrong: int, cut: bool) -> str:
    who, other, thing, first, times, more = parts
    product = first * times + wrong
    lines = [
        f"{who} has {first} {thing}.",
        f"{other} has {times} times as many: {first} * {times}.",
        *(f"  {first} * {step} = {first * step}" for step in range(1, min(times, 9) + 1)),
        f"So {first} * {times} = {product}.",
        f"Then {other} gets {more} more: {product} + {more} = {product + more}.",
        f"{other} has {product + more} {thing} now.",
        f"The answer is \\boxed{{{product + more}}} & no <b>markup</b> </script> ends here.",
    ]
    return "\n".join(lines[: len(lines) // 2] if cut else lines)


def _draw(
    rng: np.random.Generator, problems: list[dict[str, Any]], ease: np.ndarray, model: str, speed: float
) -> list[tuple[SampleRow, ScoreRow]]:
    skill, pace, count = MODELS[model]
    pace = pace if model == "teacher" else pace / speed
    rows = []
    for j in range(count):
        for i, problem in enumerate(problems):
            right = bool(rng.random() < ease[i] * skill)
            cut = not right and bool(rng.random() < 0.12)
            wrong = 0 if right or cut else int(rng.choice([-1, 1, 10, -10, 3, 100], p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05]))
            start = pace * (j * len(problems) + i * 0.5)
            end = pace * len(problems) * (j + 0.55 + 0.6 * rng.random())
            answer = None if cut else str(int(problem["answer"]) + wrong)
            text = _chain(problem["_parts"], wrong, cut)
            sample = SampleRow(
                problem_id=problem["id"],
                sample_index=j,
                seed=7,
                text=text,
                token_count=len(text) // 3,
                finish_reason="length" if cut else "stop",
                t_start=start,
                t_end=end,
                logprob_sum=-float(rng.gamma(3, 6)),
                model=model,
            )
            klass = -1 if cut else abs(wrong) + 200 * (wrong < 0)
            rows.append((sample, ScoreRow(problem["id"], j, answer, klass, right)))
    return rows


def _table(rows: list[tuple[SampleRow, ScoreRow]], place: dict[str, int]) -> Table:
    return Table(
        problem=np.array([place[sample.problem_id] for sample, _ in rows]),
        sample_index=np.array([sample.sample_index for sample, _ in rows]),
        t_end=np.array([sample.t_end for sample, _ in rows]),
        answer_class=np.array([score.answer_class for _, score in rows]),
        correct=np.array([score.correct for _, score in rows]),
    )


def _add_rewards(run: Path) -> None:
    """Rewards for every sample, above 0 for right ones alone, and curves that know of them."""
    document = json.loads((run / "curves" / "curves.json").read_text())
    ids = [json.loads(line)["id"] for line in (run / "problems" / "problems.jsonl").read_text().splitlines()]
    place, tables = {problem: index for index, problem in enumerate(ids)}, {}
    for model in MODELS:
        dice = np.random.default_rng(len(model))
        scores = {(row.problem_id, row.sample_index): row for row in read_scores(run / "scores" / f"{model}.parquet")}
        rows = [(row, scores[row.problem_id, row.sample_index]) for row in read_samples(run / "samples" / model)]
        sizes = dice.uniform(0.5, 2.0, len(rows)) * [1 if score.correct else -1 for _, score in rows]
        rewards = [
            RewardRow(row.problem_id, row.sample_index, float(size), "[]", 0.001)
            for (row, _), size in zip(rows, sizes, strict=True)
        ]
        append_rows(run / "rewards" / model, rewards, RewardRow)
        tables[model] = replace(_table(rows, place), score=sizes)
    found = budget.curves(tables, len(ids), "teacher", SECONDS, KS, seed=3, replicates=100)
    (run / "curves" / "curves.json").write_text(json.dumps(document | found))


def _plan(kept: set[int]) -> dict[str, Any]:
    layers = []
    for index in range(4):
        stem = f"layers.{index}"
        tensors = [{"name": f"{stem}.mlp.gate_proj.weight", "how": "copied", "source": "mlp.gate_proj"}]
        if index in kept:
            tensors += [
                {"name": f"{stem}.mixer.{n}.weight", "how": "copied", "source": n} for n in ("q_proj", "o_proj")
            ]
        else:
            tensors += [
                {"name": f"{stem}.mixer.in_proj.weight[x]", "how": "copied", "source": "v_proj"},
                {"name": f"{stem}.mixer.in_proj.weight[z]", "how": "initialised", "source": "least squares"},
                {"name": f"{stem}.mixer.A_log", "how": "new", "source": "half-lives 8, 32, 128, 512"},
            ]
        layers.append(
            {
                "index": index,
                "teacher": "attention",
                "student": "attention" if index in kept else "mamba",
                "tensors": tensors,
            }
        )
    fresh = 4 - len(kept)
    return {
        "layers": layers,
        "tensors": [{"name": "embedding.weight", "how": "copied", "source": "embed_tokens"}],
        "parameters": {"copied": 520_000 + 48_000 * len(kept), "initialised": 33_000 * fresh, "new": 2_100 * fresh},
    }


def _write_samples(run: Path, model: str, rows: list[tuple[SampleRow, ScoreRow]]) -> None:
    samples, scores = [sample for sample, _ in rows], [score for _, score in rows]
    for half in (samples[: len(rows) // 2], samples[len(rows) // 2 :]):
        append_samples(run / "samples" / model, half)
    write_scores(run / "scores" / f"{model}.parquet", scores[::-1])


def build_run(run: Path, problems: int = 40, seed: int = 3, speed: float = 1.0) -> Path:
    """Write a whole run directory; `speed` scales the students' clock (below 0.5 the teacher wins)."""
    rng = np.random.default_rng(seed)
    rows = [_word_problem(rng, index) for index in range(problems)]
    ids = [row["id"] for row in rows]
    ease = np.clip(rng.beta(0.55, 1.1, problems), 0.015, 0.98)
    samples = {model: _draw(rng, rows, ease, model, speed) for model in MODELS}
    for name in ("curves", "problems"):
        (run / name).mkdir(parents=True)
    place = {problem: index for index, problem in enumerate(ids)}
    tables = {model: _table(drawn, place) for model, drawn in samples.items()}
    curves = budget.curves(tables, problems, "teacher", SECONDS, KS, seed=seed, replicates=400)
    (run / "curves" / "curves.json").write_text(json.dumps(curves))
    lines = [json.dumps({k: v for k, v in row.items() if k != "_parts"}) for row in rows]
    (run / "problems" / "problems.jsonl").write_text("\n".join(lines) + "\n")
    for model, drawn in samples.items():
        _write_samples(run, model, drawn)
    for model, kept in (("pure", set()), ("hybrid", {1})):
        (run / "models" / model).mkdir(parents=True)
        (run / "models" / model / "plan.json").write_text(json.dumps(_plan(kept)))
    record = {
        "stage": "sample",
        "settings": {"n": 32, "temperature": 0.8, "max_tokens": 512, "slots": 128, "stop": None},
        "inputs": {},
        "seed": 7,
        "hash": "0" * 64,
        "command": "thinkfast demo --out runs/demo",
        "code": "0.1.0 (abc1234)",
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "machine": {"processor": "EPYC", "cores": 2, "memory_bytes": 8 * 2**30, "system": "Linux x86_64"},
        "started": "2025-03-01T09:00:00+00:00",
        "ended": "2025-03-01T09:01:28+00:00",
        "status": "complete",
    }
    (run / "samples" / "teacher" / "run.json").write_text(json.dumps(record))
    trained = {"teacher": (24_000_000, None), "pure": (5_400_000, 0.0061), "hybrid": (4_200_000, 0.0072)}
    totals = {
        model: {
            "pass@1": float(np.mean([score.correct for _, score in drawn])),
            "majority": curves["by_k"][model]["majority"]["mean"][-1],
            "train_tokens": trained[model][0],
            "kl": trained[model][1],
        }
        for model, drawn in samples.items()
    }
    stages = {"problems": 1.2, "teacher": 241.0, "convert": 3.1, "distill": 186.4, "sample": 88.0, "grade": 9.3}
    summary = {"seconds": 540.2, "models": totals, "wins": curves["wins"], "stages": stages}
    (run / "summary.json").write_text(json.dumps(summary))
    micro = {"teacher": (10.0, 0.065), "pure": (18.8, 0.0), "hybrid": (17.0, 0.018)}
    bench = [
        {"model": m, "batch": b, "context": c, "tokens_per_second": 1e6 / (a + slope * c) * (b / (b + 6))}
        for m, (a, slope) in micro.items()
        for b in (1, 32, 128)
        for c in (64, 256, 512, 1024)
    ]
    (run / "bench.json").write_text(json.dumps({"rows": bench}))
    return run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run most tests read; nobody may write into it."""
    return build_run(tmp_path_factory.mktemp("demo") / "run")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A small run of its own, to be broken or changed."""

    def make(**options: Any) -> Path:
        return build_run(tmp_path / "run", **({"problems": 6} | options))

    return make


@pytest.fixture
def add_rewards() -> Callable[[Path], None]:
    """Gives a run rewards for every sample, and curves that know of them."""
    return _add_rewards
