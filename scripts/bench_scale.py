"""Rewards, adaptive sampling and the planner, on the samples of a finished run.

    python scripts/bench_scale.py runs/demo --out benchmarks/results/scale

Writes verifier.json (areas within problems, weighted best of n against majority), adapt.json, plan.json and curves.json
with fronts, crossings and speed-ups. The verifier is trained on samples of other problems than it is measured on.
"""

import argparse
import json
import time
from pathlib import Path

from thinkfast import records, results, rewards, runtime, spending
from thinkfast.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--pilot", type=int, default=4)
    parser.add_argument("--error", type=float, default=0.05)
    given = parser.parse_args()
    started = time.monotonic()
    recipe = load_recipe(given.run / "recipe.toml")
    problems = given.run / "problems" / "problems.jsonl"
    samples = [given.run / "samples" / name for name in recipe.models]
    slots = records.read_json(samples[0] / "run.json")["notes"]["slots"]["chosen"]
    grid = recipe.compare.grid
    teacher = given.run / "models" / recipe.models[0]
    values = {"steps": given.steps, "lr": 3e-4}
    seconds = {}

    def keep(name: str, document: dict[str, object], words: list[str]) -> None:
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)
        records.write_json(given.out / f"{name}.json", document)
        print("\n".join([f"-- {name}, {seconds[name]} s", *words]), flush=True)

    document = spending.compare_sources(samples, problems, recipe.compare, None)
    keep("curves", document, spending.in_words(document))
    document = spending.adapt_sources(samples, problems, (grid.first, grid.last), given.error, slots, None)
    keep("adapt", document, spending.adapted_in_words(document))
    fewest = min(min(results.sample_counts(folder).values()) for folder in samples)
    document = spending.plan_sources(samples, problems, recipe.compare.ks, min(given.pilot, fewest), 0, None)
    keep("plan", document, spending.planned_in_words(document))
    document = rewards.train_file(teacher, samples[0], problems, given.run / "verifier", values, 0)
    keep("verifier", document, rewards.verification_in_words(document))
    note = {"command": runtime.command(), "machine": runtime.machine(), "seconds": seconds}
    records.write_json(given.out / "note.json", note)
    print(json.dumps(note))


if __name__ == "__main__":
    main()
