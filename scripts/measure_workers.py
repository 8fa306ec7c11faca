"""How much two Ray workers draw against one, and whether they draw the same rows.

    python scripts/measure_workers.py MODEL --out benchmarks/results/ray-workers.json

A worker is a process with one thread, so one worker is one core's worth of work and two are two cores' worth; the
driver, which collects and stores the samples, has to share the cores with two. What is compared is the clock of the
sampling, from the first prefill to the last end: starting Ray and loading models are outside it. A quiet machine is
needed. Ray gives its workers a niceness of 15; RAY_worker_niceness=0 takes it away.
"""

import argparse
import tempfile
from pathlib import Path

from thinkfast import records
from thinkfast.data.problems import Problem
from thinkfast.data.wordproblems import generate
from thinkfast.recipe import SampleSettings
from thinkfast.scale.sample import sample_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=900)
    parser.add_argument("--slots", type=int, default=64)
    given = parser.parse_args()
    problems = [Problem(p.id, p.problem, p.answer) for p in generate(3, given.problems, "held-out", [3, 4])]
    settings = SampleSettings(n=given.n, seconds=3600.0, max_tokens=given.max_tokens, slots=(given.slots,), seed=1)
    rates, seconds, texts = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            out = Path(folder) / str(workers)
            drawn = sample_model(given.model, problems, settings, out, workers=workers)
            seconds[str(workers)] = round(drawn.seconds, 2)
            rates[workers] = drawn.samples / drawn.seconds
            texts.append({(row.problem_id, row.sample_index): row.text for row in records.read_samples(out)})
    document = {
        "samples": len(texts[0]),
        "samples_per_second": {str(workers): round(rate, 2) for workers, rate in rates.items()},
        "seconds": seconds,
        "ratio": round(rates[2] / rates[1], 3),
        "same_rows": texts[0] == texts[1],
        "threads_a_worker": 1,
        "clock": "from the first prefill to the last end, without starting workers and loading models",
        "settings": vars(given) | {"model": given.model.name, "out": None},
    }
    records.publish(document, given.out)


if __name__ == "__main__":
    main()
