"""Kills a sampling run with SIGKILL at random instants, over and over, and checks that nothing is lost or doubled.

    python scripts/kill_sampling.py MODEL --kills 100 --out benchmarks/results/kills.json

After every kill the rows that were on the disk before must still be there, unchanged and once; at the end the rows
must be those of a run that nobody interrupted.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet

from thinkfast import records
from thinkfast.data.problems import Problem
from thinkfast.data.wordproblems import generate
from thinkfast.recipe import SampleSettings
from thinkfast.scale.sample import sample_model


def rows_of(directory: Path) -> tuple[dict[tuple[str, int], str], int]:
    """The text of every pair on the disk, and how many rows there are beyond one a pair, counted part by part."""
    texts: dict[tuple[str, int], str] = {}
    count = 0
    for part in sorted(directory.glob("part-*.parquet")):
        rows = pyarrow.parquet.read_table(part, columns=["problem_id", "sample_index", "text"]).to_pylist()
        count += len(rows)
        texts |= {(row["problem_id"], row["sample_index"]): row["text"] for row in rows}
    return texts, count - len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2)
    given = parser.parse_args()
    settings = SampleSettings(n=10_000, seconds=1e6, max_tokens=24, slots=(16,), seed=5)
    problems = [Problem(p.id, p.problem, p.answer) for p in generate(3, 20, "held-out", [3])]
    if given.child:
        count, out = given.child
        from thinkfast.scale import sample

        sample.FLUSH_SECONDS = 0.05
        sample_model(given.model, problems, settings.model_copy(update={"n": int(count)}), Path(out))
        return
    dice, lost, doubled = random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "killed", time.monotonic()
        command = [sys.executable, __file__, str(given.model), "--child", "10000", str(out)]
        held: dict[tuple[str, int], str] = {}
        for kill in range(given.kills):
            with subprocess.Popen(command) as process:
                parts = len(list(out.glob("part-*.parquet"))) if out.exists() else 0
                while process.poll() is None and len(list(out.glob("part-*.parquet"))) == parts:
                    time.sleep(0.01)
                time.sleep(dice.random() * 0.3)
                process.kill()
            now, twice = rows_of(out)
            doubled = max(doubled, twice)
            lost += len(held.items() - now.items())
            held = now
            print(f"{kill + 1} kills, {len(held)} rows, {lost} lost, {doubled} doubled", file=sys.stderr)
        rounds = max(index for _, index in held) + 1
        whole = Path(folder) / "whole"
        sample_model(given.model, problems, settings.model_copy(update={"n": rounds}), whole)
        same = held.items() <= rows_of(whole)[0].items()
        document = {
            "kills": given.kills,
            "rows": len(held),
            "lost": lost,
            "doubled": doubled,
            "equal_to_uninterrupted": same,
            "seconds": round(time.monotonic() - started, 1),
            "problems": len(problems),
        }
    records.publish(document, given.out)


if __name__ == "__main__":
    main()
