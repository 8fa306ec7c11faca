"""One step of benchmarks/gpu.sh; what a step measures stands in its JSON file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from common import DEVICE, DRY, PROMPT, SHARING, Results
from correctness import correctness
from decoding import decoding
from stock import stock
from training import training

UNFINISHED = 75

ABOUT = {
    "correctness": "largest relative error (2-norm) of each kernel against float64; counts of differing samples",
    "decoding": f"tokens/s of thinkfast's engine in bfloat16, prompts of {PROMPT} tokens for {SHARING} samples; "
    "steps timed at four places over the generated range, not every step of it; prefill apart",
    "stock": f"tokens/s of whole `transformers` generate calls, {PROMPT}-token prompts, static cache, compiled",
    "train": "seconds of the state-space scan of one layer, float32 in and out",
}


def main() -> int:
    """Runs one step; 1 where something is wrong, 75 where time ran out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["correctness", "1b", "3b", "hf-1b", "hf-3b", "train"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    given = parser.parse_args()
    if DEVICE.type == "cpu" and not DRY:
        parser.error("there is no GPU; --dry runs tiny shapes without one")
    kind = "decoding" if given.step in ("1b", "3b") else "stock" if given.step.startswith("hf") else given.step
    results = Results(given.out, given.step, ABOUT[kind])
    size = given.step.removeprefix("hf-")
    steps: dict[str, Callable[[], None]] = {
        "correctness": lambda: correctness(results),
        "decoding": lambda: decoding(results, size),
        "stock": lambda: stock(results, size),
        "train": lambda: training(results),
    }
    steps[kind]()
    wrong = [row for row in results.rows if row.get("ok") is False]
    for row in wrong:
        print("WRONG", json.dumps(row))
    print(f"{len(results.rows)} rows in {results.path}{'; call again for the rest' if results.skipped else ''}")
    return 1 if wrong else UNFINISHED if results.skipped else 0


if __name__ == "__main__":
    sys.exit(main())
