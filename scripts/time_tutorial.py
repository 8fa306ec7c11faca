"""How long the commands and the program of docs/tutorial.md take, each as it is printed there.

    python scripts/time_tutorial.py --out benchmarks/results/tutorial.json

In a new directory, in processes of their own. `thinkfast run` stands there twice: the second finds everything done.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from thinkfast import records

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        for language, title, text in FENCE.findall(TUTORIAL.read_text()):
            if title:
                (Path(folder) / title).write_text(text)
                continue
            for words in [["-c", text]] if language == "python" else map(str.split, text.splitlines()):
                program = words if language == "python" else ["-m", *words]
                started = time.perf_counter()
                subprocess.run([sys.executable, *program], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                shown = "the Python program" if language == "python" else " ".join(words)
                steps.append({"step": shown, "seconds": round(time.perf_counter() - started, 1)})
                print(*steps[-1].values(), sep="\t", file=sys.stderr, flush=True)
    document = {
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "steps": steps,
        "seconds": round(sum(step["seconds"] for step in steps), 1),
    }
    records.publish(document, given.out)


if __name__ == "__main__":
    main()
