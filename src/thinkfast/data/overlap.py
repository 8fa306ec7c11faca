"""Which problems of a test set also stand in a training set, word for word or nearly."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkfast.data.problems import Problem

WORDS = 8
NEAR = 0.6


@dataclass(frozen=True, slots=True)
class Overlap:
    """A problem of the test set and the most similar one of the training set.

    `share`: which part of the test problem's runs of eight words also stands in the other; 1 for equal texts.
    """

    test_id: str
    train_id: str
    share: float


def find_overlap(test: Sequence[Problem], train: Sequence[Problem], near: float = NEAR) -> list[Overlap]:
    """Every test problem whose runs of words stand in one training problem to at least the share `near`.

    Texts are compared as lower-case words and signs, without spaces and the space commands of LaTeX; numbers count, so
    that problems which differ in their numbers alone are not the same. A text shorter than a run counts as one run.
    """
    holders: dict[tuple[str, ...], set[int]] = defaultdict(set)
    wanted = [_runs(problem.problem) for problem in test]
    asked = set().union(*wanted)
    for place, problem in enumerate(train):
        for run in _runs(problem.problem) & asked:
            holders[run].add(place)
    found = []
    for problem, runs in zip(test, wanted, strict=True):
        counts: dict[int, int] = defaultdict(int)
        for run in runs:
            for place in holders.get(run, ()):
                counts[place] += 1
        if counts:
            place = max(counts, key=lambda other: (counts[other], -other))
            share = counts[place] / len(runs)
            if share >= near:
                found.append(Overlap(problem.id, train[place].id, round(share, 4)))
    return found


def report_overlap(test: str | Path, train: str | Path) -> dict[str, object]:
    """`find_overlap` of two sets by name or file, as a document; the overlapping problems are listed."""
    from thinkfast.data.sets import open_problems

    problems = open_problems(test)
    found = find_overlap(problems, open_problems(train))
    listed = [{"test": entry.test_id, "train": entry.train_id, "share": entry.share} for entry in found]
    return {"problems": len(problems), "overlapping": len(found), "share": len(found) / len(problems), "found": listed}


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\d+(?:\.\d+)?|[a-z]+|[^\sa-z\d]", re.sub(r"\\[,;:! ]", "", text.lower()))
    return {tuple(words[start : start + WORDS]) for start in range(max(1, len(words) - WORDS + 1))}
