"""One answer out of many: majority vote, best of n and weighted best of n."""

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

from thinkfast.errors import BadInput

Answer = TypeVar("Answer", bound=Hashable)


def vote_totals(answers: Sequence[Answer | None], weights: Sequence[float] | None = None) -> dict[Answer, float]:
    """Total weight of every answer, in order of first appearance; None votes for nobody.

    Without weights every answer counts 1. Raises BadInput when there are not as many weights as answers or one of
    them is not a finite number.
    """
    if weights is None:
        weights = [1.0] * len(answers)
    elif len(weights) != len(answers):
        raise BadInput(f"{len(weights)} scores for {len(answers)} answers: one score an answer is expected")
    totals: dict[Answer, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if not math.isfinite(weight):
            raise BadInput(f"score {weight}: a finite number is expected")
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return totals


def majority_vote(answers: Sequence[Answer | None]) -> Answer | None:
    """The most frequent answer; the first seen among equals; None when there is no answer at all."""
    totals = vote_totals(answers)
    return max(totals, key=totals.__getitem__) if totals else None


def best_of_n(answers: Sequence[Answer | None], scores: Sequence[float], weighted: bool = False) -> Answer | None:
    """The answer with the highest score or, weighted, with the highest sum of scores over equal answers.

    Answers that are None never win, whatever their score; equal scores go to the first seen; None when there is no
    answer at all. Raises BadInput as `vote_totals` does. Weighted best of n: arXiv 2211.14275.
    """
    totals = vote_totals(answers, scores)
    if not totals:
        return None
    if weighted:
        return max(totals, key=totals.__getitem__)
    candidates = [position for position, answer in enumerate(answers) if answer is not None]
    return answers[max(candidates, key=scores.__getitem__)]
