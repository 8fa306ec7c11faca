"""Rewards, adaptive sampling, the planner and retention, measured with the models of a finished run.

    python scripts/bench_scale.py runs/demo --out benchmarks/results/scale

Writes a JSON document for every part:
live.json       uniform against adaptive sampling, drawn one after the other for the same seconds on the clock
verifier.json   a verifier trained on samples of other problems: areas within problems, weighted best of n, time curves
plan.json       the planner's forecasts and how far they are from samples that it has not seen
curves.json     fronts, crossings, speed-ups and dollars of the run's models
retention.json  what the students kept, level by level
estimators.json a million samples through every estimator, on one core
and note.json. What is drawn or trained stands in RUN/scale and is not done again; what was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from thinkfast import progress, records, results, retention, rewards, runtime, spending, stages
from thinkfast.data.problems import Problem, dump_problems, load_problems
from thinkfast.recipe import Compare, Problems, Recipe, SampleSettings, load_recipe, section
from thinkfast.scale.budget import Table, curves
from thinkfast.scale.sample import sample_model

PRICE = 2.5  # dollars an hour, an example
LIVE_PROBLEMS, LIVE_SECONDS, LIVE_N = 160, 60.0, 64
STOP_ERROR = 0.2
TRAINING_PROBLEMS, TRAINING_N, TRAINING_STEPS = 1200, 3, 500
PILOT = 4
FORECAST = {"live": 270, "verifier": 690, "plan": 15, "curves": 15, "retention": 60, "estimators": 15}  # seconds


class Bench:
    """The run, its recipe, and where things go."""

    def __init__(self, run: Path, out: Path) -> None:
        self.run, self.out = run, out
        self.recipe: Recipe = load_recipe(run / "recipe.toml")
        self.work = run / "scale"
        self.problems = run / "problems" / "problems.jsonl"
        self.fewer = self.work / "problems.jsonl"
        chosen = load_problems(self.problems)[:LIVE_PROBLEMS]
        records.write_text(self.fewer, dump_problems(chosen))
        self.chosen: list[Problem] = chosen
        self.teacher, self.student = self.recipe.models[0], self.recipe.models[-1]

    def draw(self, name: str, problems: list[Problem], place: Path, **values: Any) -> Path:
        """Samples of a model of the run, drawn as in the run but for `values`."""
        slots = records.read_json(self.run / "samples" / name / "run.json")["notes"]["slots"]["chosen"]
        own = self.recipe.sample.model_dump(exclude_none=True) | {"slots": (slots,)} | values
        with progress.bar(f"{place.parent.name}/{name}", 1.0) as update:
            settings = section(SampleSettings, own)
            sample_model(self.run / "models" / name, problems, settings, place, name, update)
        return place

    def live(self) -> tuple[dict[str, Any], list[str]]:
        """Both kinds in turn for the teacher and the last student, at the same seconds."""
        document: dict[str, Any] = {"stop_error": STOP_ERROR, "seconds": LIVE_SECONDS, "models": {}}
        words = []
        for name in (self.teacher, self.student):
            for kind, more in (("uniform", {}), ("adaptive", {"stop_error": STOP_ERROR})):
                values = {"n": LIVE_N, "seconds": LIVE_SECONDS} | more
                self.draw(name, self.chosen, self.work / kind / name, **values)
            sources = [self.work / kind / name for kind in ("uniform", "adaptive")]
            tables = {}
            for source in sources:
                held, count = spending.read_tables([source], self.fewer)
                tables[source.parent.name] = held[name]
            last = LIVE_SECONDS / len(self.chosen)
            grid = {"first": last / 15, "last": last, "points": 25}
            settings = section(Compare, {"baseline": "uniform", "grid": grid})
            found = results.compare_tables(tables, count, settings)
            stopped = records.read_json(sources[1] / "run.json")["notes"]["stopped"]
            document["models"][name] = {
                "stopped_problems": stopped,
                "overturned": overturned(sources[0], sources[1], self.fewer),
                **{key: found[key] for key in ("seconds", "by_time", "difference", "wins")},
            }
            gain = found["difference"]["adaptive"]["majority"]
            told = f"{gain['mean'][-1]:+.3f} [{gain['low'][-1]:+.3f}, {gain['high'][-1]:+.3f}]"
            words.append(f"{name}: adaptive minus uniform, majority at {last:.3g} s a problem: {told}")
        return document, words

    def verifier(self) -> tuple[dict[str, Any], list[str]]:
        """Trained on the teacher's samples of training problems, measured on the run's own samples of two models."""
        levels = self.recipe.corpus.levels
        made = section(Problems, {"seed": 77, "count": TRAINING_PROBLEMS, "levels": levels})
        problems = stages.generated(made, "train")
        source = self.work / "train" / "samples"
        records.write_text(self.work / "train" / "problems.jsonl", dump_problems(problems))
        self.draw(self.teacher, problems, source, n=TRAINING_N, seconds=6000.0, slots=(64,), seed=0)
        teacher, place = self.run / "models" / self.teacher, self.work / "verifier"
        values = {"steps": TRAINING_STEPS}
        document = {"held_out": rewards.train_file(teacher, source, source.parent / "problems.jsonl", place, values, 0)}
        words = ["held-out training problems:", *rewards.verification_in_words(document["held_out"])]
        scored, sources = [], [self.run / "samples" / name for name in (self.teacher, self.student)]
        for drawn in sources:
            scored.append(self.work / "rewards" / drawn.name)
            rewards.score_file(place, drawn, self.problems, scored[-1], "last", None)
            document[drawn.name] = rewards.worth_of_rewards(drawn, self.problems, scored[-1])
            words += [f"samples of {drawn.name}:", *rewards.verification_in_words(document[drawn.name])]
        for counted in ((), ("rewards",)):
            found = spending.compare_sources(sources, self.problems, self.recipe.compare, None, scored, None, counted)
            key = "by_time" if not counted else "by_time_with_reward_seconds"
            document[key] = {"seconds": found["seconds"], "models": found["by_time"]}
        return document, words

    def plan(self) -> tuple[dict[str, Any], list[str]]:
        """Pilots of the teacher and the last student, scored on what was drawn behind them."""
        last = LIVE_SECONDS / len(self.chosen)
        settings = section(Compare, {"ks": [1, 2, 4, 8, 16, 32], "grid": {"first": last / 15, "last": 4 * last}})
        sources = [self.work / "uniform" / name for name in (self.teacher, self.student)]
        document = spending.plan_sources(sources, self.fewer, settings, PILOT, None)
        return document, spending.planned_in_words(document)

    def curves(self) -> tuple[dict[str, Any], list[str]]:
        """The run's own samples of all its models."""
        samples = [self.run / "samples" / name for name in self.recipe.models]
        document = spending.compare_sources(samples, self.problems, self.recipe.compare, None, (), PRICE)
        return document, spending.in_words(document)

    def retention(self) -> tuple[dict[str, Any], list[str]]:
        """The students against the teacher on the run's samples."""
        models = [self.run / "models" / name for name in self.recipe.models]
        document = retention.retain(models, self.run / "samples", self.problems)
        return document, retention.in_words(document)

    def estimators(self) -> tuple[dict[str, Any], list[str]]:
        """Coverage, majority, best of n and weighted best of n by k and by time with intervals: a million samples."""
        problems, n = 1000, 1000
        dice = np.random.default_rng(0)
        owner, index = np.tile(np.arange(problems), n), np.repeat(np.arange(n), problems)
        right = dice.random(len(owner)) < dice.beta(0.6, 0.8, problems)[owner]
        klass = np.where(right, 0, dice.integers(1, 12, len(owner)))
        table = Table(
            owner, index, np.arange(len(owner)) * 1e-3, klass, right, None, dice.normal(size=len(owner)) + right
        )
        started, spent = time.monotonic(), time.process_time()
        grid = np.geomspace(0.01, 1.0, 40)
        curves({"million": table}, problems, "million", grid, [2**i for i in range(10)], seed=0)
        document = {
            "samples": len(owner),
            "problems": problems,
            "seconds": round(time.monotonic() - started, 3),
            "processor_seconds": round(time.process_time() - spent, 3),
        }
        return document, [json.dumps(document)]


def overturned(uniform: Path, adaptive: Path, problems_file: Path) -> dict[str, Any]:
    """Of the problems that adaptive sampling stopped early, those whose vote all uniform samples would turn."""
    problems, more = results.read_source(uniform, problems_file)
    _, fewer = results.read_source(adaptive, problems_file)
    first, second = (retention.votes(one, problems) for one in (more, fewer))
    counts = [results.sample_counts(place) for place in (uniform, adaptive)]
    early = [i for i, p in enumerate(problems) if counts[1].get(p.id, 0) < counts[0].get(p.id, 0)]
    same = retention.same_votes(first, second, problems)
    return {"stopped_before_uniform": len(early), "other_vote": sum(not same[i] for i in early)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("live", "verifier", "plan", "curves", "retention", "estimators")
    parser.add_argument("run", type=Path)
    parser.add_argument("parts", nargs="*", default=parts, help=f"of {', '.join(parts)}; by default all")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    unknown = next((name for name in given.parts if name not in parts), None)
    if unknown is not None:
        parser.error(f"part {unknown!r}: expected some of {', '.join(parts)}")
    bench = Bench(given.run, given.out)
    minutes = sum(FORECAST[name] for name in given.parts) / 60
    print(f"about {minutes:.0f} minutes on two idle cores, less by what is in {bench.work} already", flush=True)
    note_file = given.out / "note.json"
    note = records.read_json(note_file) if note_file.exists() else {"seconds": {}}
    for name in given.parts:
        started = time.monotonic()
        part: Callable[[], tuple[dict[str, Any], list[str]]] = getattr(bench, name)
        document, words = part()
        seconds = round(time.monotonic() - started, 1)
        records.write_json(given.out / f"{name}.json", document | {"command": runtime.command()})
        print("\n".join([f"-- {name}, {seconds} s", *words]), flush=True)
        note["seconds"][name] = seconds
        records.write_json(note_file, note | {"command": runtime.command(), "machine": runtime.machine()})


if __name__ == "__main__":
    main()
