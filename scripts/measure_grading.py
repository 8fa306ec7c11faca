"""How thinkfast's verdicts stand beside published ones, and why they differ where they do.

    python scripts/measure_grading.py DATA --out benchmarks/results/scale/grading.json

DATA holds equivalence/cases.jsonl, rows `id, gold, pred, equal, core` collected from the tests of other graders, and
completions/openai_gsm8k_4models.jsonl.gz, published completions of GSM8K by four models with their verdicts. The
reasons are those of tests/scale/disagreements.toml.
"""

import argparse
import gzip
import json
import time
import tomllib
from pathlib import Path
from typing import Any

from thinkfast import records
from thinkfast.scale.grade import Grader, extract_answer

REASONS = Path(__file__).parents[1] / "tests" / "scale" / "disagreements.toml"


def equivalence(grader: Grader, rows: list[dict[str, Any]], reasons: dict[str, str]) -> dict[str, Any]:
    """Rows on which we say what the case asks for, and the others with their reasons."""
    wrong = [row for row in rows if grader.equal(row["gold"], row["pred"]) != row["equal"]]
    core = [row for row in rows if row["core"]]
    missed = sum(row["core"] for row in wrong)
    return {
        "rows": len(rows),
        "agree": len(rows) - len(wrong),
        "core_rows": len(core),
        "core_agree": len(core) - missed,
        "core_share": round(1 - missed / len(core), 4),
        "disagreements": [
            {"id": row["id"], "core": row["core"], "expected": row["equal"], "reason": reasons.get(row["id"])}
            for row in wrong
        ],
    }


def completions(grader: Grader, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of right completions of every model by both, and every verdict that differs."""
    ours = [grader.grade(row["answer"], [extract_answer(text) for text in row["completions"]])[1] for row in rows]
    models = rows[0]["models"]
    document: dict[str, Any] = {"problems": len(rows), "models": {}, "differences": []}
    for place, name in enumerate(models):
        said = [bool(row["is_correct"][place]) for row in rows]
        found = [verdicts[place] for verdicts in ours]
        document["models"][name] = {
            "published_percent": round(100 * sum(said) / len(rows), 2),
            "percent": round(100 * sum(found) / len(rows), 2),
        }
        document["differences"] += [
            {"row": i, "model": name, "published": a, "ours": b}
            for i, (a, b) in enumerate(zip(said, found, strict=True))
            if a != b
        ]
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with (given.data / "equivalence" / "cases.jsonl").open() as lines:
        cases = [json.loads(line) for line in lines]
    with gzip.open(given.data / "completions" / "openai_gsm8k_4models.jsonl.gz", "rt") as lines:
        published = [json.loads(line) for line in lines]
    reasons = tomllib.loads(REASONS.read_text())["reasons"]
    started = time.monotonic()
    with Grader() as grader:
        document = {
            "equivalence": equivalence(grader, cases, reasons),
            "completions": completions(grader, published),
            "seconds": round(time.monotonic() - started, 1),
        }
    records.publish(document, given.out)


if __name__ == "__main__":
    main()
