"""Public problem sets by name, from the Hugging Face hub.

Each set says where it lives, which split is asked and how a row becomes a problem. Needs `pip install thinkfast[data]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thinkfast.data.answers import boxed
from thinkfast.data.problems import Complain, Problem, collect_problems, load_problems, refuse
from thinkfast.errors import BadInput


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """A public set. `gold`: the answer is a field, the last box of the solution, or what follows ####."""

    hub: str
    split: str
    problem: str = "problem"
    answer: str = "answer"
    gold: Literal["field", "boxed", "hash"] = "field"
    solution: str | None = "solution"
    configs: tuple[str | None, ...] = (None,)
    train: str | None = None


SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SETS = {
    "gsm8k": ProblemSet(
        "openai/gsm8k", "test", "question", "answer", "hash", "answer", configs=("main",), train="train"
    ),
    "math": ProblemSet(
        "EleutherAI/hendrycks_math", "test", answer="solution", gold="boxed", configs=SUBJECTS, train="train"
    ),
    "math500": ProblemSet("HuggingFaceH4/MATH-500", "test"),
    "amc23": ProblemSet("math-ai/amc23", "test", "question", solution=None),
    "aime2024": ProblemSet("HuggingFaceH4/aime_2024", "train"),
    "aime2025": ProblemSet("math-ai/aime25", "test", solution=None),
    "olympiadbench": ProblemSet(
        "Hothan/OlympiadBench", "train", "question", "final_answer", configs=("OE_TO_maths_en_COMP",)
    ),
    "minerva": ProblemSet("math-ai/minervamath", "test", "question", solution=None),
}


def open_problems(source: str | Path, complain: Complain = refuse, answers: bool = True) -> list[Problem]:
    """A set by name ("math500"; "gsm8k:train" for the split to learn from), or a JSONL, JSONL.gz or Parquet file.

    A name wins over a file only where no such file exists. `complain` gets one line for every unusable row; by default
    the first one raises BadInput. Raises BadInput for an unknown name, and as `load_problems` does, also of `answers`.
    """
    name, _, split = str(source).partition(":")
    if Path(source).exists() or name not in SETS:
        if not Path(source).exists() and "." not in str(source) and "/" not in str(source):
            raise BadInput(f"{source}: neither a problem file nor one of {', '.join(SETS)}")
        return load_problems(source, complain, answers)
    known = SETS[name]
    if split not in ("", known.split, known.train):
        raise BadInput(f"{source}: split {split!r}, expected {' or '.join(s for s in (known.split, known.train) if s)}")
    return _download(name, known, split or known.split, complain)


def _download(name: str, known: ProblemSet, split: str, complain: Complain) -> list[Problem]:
    try:
        import datasets
    except ImportError:
        raise BadInput(f"{name}: public sets need the extra: pip install 'thinkfast[data]'") from None
    rows: list[tuple[int, Any]] = []
    for config in known.configs:
        try:
            table = datasets.load_dataset(known.hub, config, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise BadInput(f"{name}: {known.hub} cannot be loaded: {str(error).splitlines()[0]}") from error
        for row in table:
            number = len(rows) + 1
            rows.append((number, normalised(known, row) | {"id": f"{name}/{split}/{row.get('unique_id', number)}"}))
    return collect_problems(name, rows, complain)


def normalised(known: ProblemSet, row: Mapping[str, Any]) -> dict[str, Any]:
    """An upstream row as `problem`, `answer`, `solution`, `level`; a field that is missing stays None."""
    answer, solution = row.get(known.answer), row.get(known.solution) if known.solution else None
    if isinstance(answer, list | tuple):
        answer = ", ".join(map(str, answer))
    if isinstance(answer, str):
        if known.gold == "hash":
            answer = answer.rpartition("####")[2].strip().replace(",", "")
        elif known.gold == "boxed":
            start = max(answer.rfind("\\boxed"), answer.rfind("\\fbox"))
            answer = boxed(answer[start:]) if start >= 0 else None
    if isinstance(solution, list | tuple):
        solution = "\n".join(map(str, solution))
    level = row.get("level")
    if isinstance(level, str):
        digits = re.search(r"\d+", level)
        level = int(digits.group()) if digits else None
    return {"problem": row.get(known.problem), "answer": answer, "solution": solution, "level": level}
