"""Measures a model directory on held-out problems: greedy accuracy by level, and the mean chain length.

    python scripts/measure_teacher.py MODEL --count 600 --levels 4 5 6 7 8

Prints one JSON document. Problems come from the held-out split with a seed that no recipe uses.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from thinkfast.data import chat, wordproblems
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.engine import Engine, SamplingParams
from thinkfast.model.checkpoint import load_model
from thinkfast.scale.grade import extract_answer


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("model", type=Path)
    options.add_argument("--count", type=int, default=600)
    options.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    options.add_argument("--seed", type=int, default=4242)
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--max-tokens", type=int, default=1200)
    chosen = options.parse_args()

    problems = wordproblems.generate(chosen.seed, chosen.count, "held-out", chosen.levels)
    words = load_tokenizer(chosen.model)
    engine = Engine(load_model(chosen.model), slots=64)
    params = SamplingParams(max_tokens=chosen.max_tokens, temperature=chosen.temperature, seed=chosen.seed)
    drawn = engine.sample([chat.render_prompt(words, p.problem) for p in problems], n=1, params=params)
    right: dict[int, list[bool]] = defaultdict(list)
    lengths: dict[int, list[int]] = defaultdict(list)
    for problem, (sample,) in zip(problems, drawn, strict=True):
        right[problem.level].append(extract_answer(words.decode(list(sample.token_ids))) == problem.answer)
        lengths[problem.level].append(len(sample.token_ids))
    everything = [correct for level in right.values() for correct in level]
    document = {
        "model": chosen.model.name,
        "temperature": chosen.temperature,
        "problems": len(everything),
        "accuracy": round(sum(everything) / len(everything), 4),
        "by_level": {
            str(level): {
                "problems": len(right[level]),
                "accuracy": round(sum(right[level]) / len(right[level]), 4),
                "mean_tokens": round(sum(lengths[level]) / len(lengths[level]), 1),
            }
            for level in sorted(right)
        },
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
