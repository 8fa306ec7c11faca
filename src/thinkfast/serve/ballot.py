"""The running vote over the chains of thought of one problem, and when it is decided."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from thinkfast.engine.sampling import DEADLINE, STOP
from thinkfast.errors import BadInput
from thinkfast.scale.adaptive import decided
from thinkfast.scale.aggregate import best_of_n, majority_vote, vote_totals
from thinkfast.scale.grade import Grader, extract_answer

STRATEGIES = ("majority", "best_of_n", "weighted", "adaptive")
RANKED = ("best_of_n", "weighted")
UNSURE = 0.05
_PLAIN = re.compile(r"[+-]?\d{1,200}(\.\d{1,200}|/[1-9]\d{0,199})?")


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain of thought that has ended.

    seconds: from the request to its end. score: what best_of_n and weighted rank by; without a reward model the
    geometric mean of the probabilities of its tokens. A chain cut off by the deadline has no answer.
    """

    index: int
    text: str
    answer: str | None
    tokens: int
    seconds: float
    finish_reason: str
    score: float

    def document(self, text: bool) -> dict[str, Any]:
        """What the server tells of it."""
        shown = {"index": self.index, "answer": self.answer, "tokens": self.tokens, "seconds": round(self.seconds, 4)}
        shown |= {"finish_reason": self.finish_reason, "score": round(self.score, 6)}
        return {**shown, "text": self.text} if text else shown


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer and how it came about.

    answer: None where no chain gave one. confidence: its share of the votes (`weighted`: of the scores). votes: a row a
    class of equal answers, the most votes first. samples: chains that ended and were counted. stopped: "decided",
    "samples" (all that were asked for), "deadline" or "closed". chain: the best scored one with the answer, or without
    one if none has any. tokens: all that were drawn, also for chains that did not end.
    """

    answer: str | None
    confidence: float
    votes: list[dict[str, Any]]
    samples: int
    seconds: float
    stopped: str
    strategy: str
    chain: Chain | None
    tokens: int = 0

    def document(self) -> dict[str, Any]:
        """As JSON, without the chain's text."""
        return {
            "answer": self.answer,
            "confidence": round(self.confidence, 4),
            "votes": self.votes,
            "samples": self.samples,
            "seconds": round(self.seconds, 4),
            "stopped": self.stopped,
            "strategy": self.strategy,
            "sample": None if self.chain is None else self.chain.index,
        }


def parse_chain(index: int, text: str, tokens: int, seconds: float, reason: str, logprob_sum: float) -> Chain:
    """A chain with the answer that its text states; one that was cut off states none."""
    answer = extract_answer(text) if reason == STOP else None
    mean = logprob_sum / max(tokens, 1)
    return Chain(index, text, answer, tokens, seconds, reason, math.exp(mean) if math.isfinite(mean) else 0.0)


class Ballot:
    """Chains and their votes. `limit`: chains there can be at most; `least`: none is decided before so many ended;
    `soft`: scores are log-probabilities or unbounded, votes weigh exp(score), scaled to a largest weight of 1.

    Plain numbers find their class at once. Other answers wait in `unplaced` until `place` says which earlier answer
    they equal, since finding out takes time; meanwhile equal texts vote together.
    """

    def __init__(self, strategy: str, limit: int, least: int = 1, soft: bool = False) -> None:
        if strategy not in STRATEGIES:
            raise BadInput(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
        self.strategy, self.limit, self.least, self.soft = strategy, limit, least, soft
        self.chains: list[Chain] = []
        self.unplaced: list[str] = []
        self.representatives: list[str] = []
        self._home: dict[Fraction | str, str] = {}

    def add(self, chain: Chain) -> None:
        """Counts a chain."""
        self.chains.append(chain)
        if chain.answer is None or _key(chain.answer) in self._home:
            return
        key = _key(chain.answer)
        self._home[key] = chain.answer
        alone = all(isinstance(other, Fraction) for other in self._home)
        (self.representatives if alone else self.unplaced).append(chain.answer)

    def place(self, answer: str, equal: str | None) -> None:
        """Puts an unplaced answer into the class of `equal`, or into one of its own."""
        self.unplaced.remove(answer)
        if equal is None:
            self.representatives.append(answer)
        else:
            self._home[_key(answer)] = equal

    def home(self, answer: str | None) -> str | None:
        """The answer that stands for the class of this one."""
        return None if answer is None else self._home[_key(answer)]

    def totals(self) -> dict[str, float]:
        """Votes of every class."""
        return vote_totals([self.home(chain.answer) for chain in self.chains])

    def decided(self) -> bool:
        """Whether more chains need not be waited for.

        majority: those still to come cannot change the answer. adaptive: with a chance of at most .05 another answer
        would lead, were there no end of them (`scale.adaptive`). Neither without more than half of the votes for one
        answer. best_of_n and weighted are never decided early.
        """
        if len(self.chains) < self.least or self.strategy in RANKED or self.unplaced:
            return False
        if self.strategy == "majority" and 2 * len(self.chains) <= self.limit:
            return False  # those to come are as many as there are
        counts = [int(votes) for votes in self.totals().values()]
        first, second = sorted([*counts, 0, 0], reverse=True)[:2]
        if 2 * first <= sum(counts):
            return False
        if first - second > self.limit - len(self.chains):
            return True
        return self.strategy == "adaptive" and decided(counts, UNSURE)

    def outcome(self, seconds: float, stopped: str) -> Outcome:
        """The answer as things stand."""
        answers = [self.home(chain.answer) for chain in self.chains]
        scores = [chain.score for chain in self.chains]
        if self.soft:
            top = max((chain.score for chain in self.chains if chain.answer is not None), default=0.0)
            scores = [math.exp(min(0.0, score - top)) for score in scores]
        totals, weights = vote_totals(answers), vote_totals(answers, scores)
        by_score = self.strategy in RANKED
        winner = best_of_n(answers, scores, self.strategy == "weighted") if by_score else majority_vote(answers)
        ended = [chain for chain in self.chains if chain.finish_reason == STOP]
        voting = [(chain.score, -chain.index, chain) for chain in ended if self.home(chain.answer) == winner]
        shares = weights if self.strategy == "weighted" and min(weights.values(), default=0) >= 0 else totals
        whole = sum(shares.values())
        return Outcome(
            answer=winner,
            confidence=shares[winner] / whole if winner is not None and whole > 0 else 0.0,
            votes=[
                {"answer": answer, "votes": int(totals[answer]), "score": round(weights[answer], 6)}
                for answer in sorted(totals, key=lambda name: -totals[name])
            ],
            samples=sum(chain.finish_reason != DEADLINE for chain in self.chains),
            seconds=seconds,
            stopped=stopped,
            strategy=self.strategy,
            chain=max(voting)[2] if voting else None,
        )


def default_strategy(judged: bool) -> str:
    """What is done where nothing else is asked for: with a reward model its scores count, without one the votes."""
    return "weighted" if judged else "majority"


def find_equal(grader: Grader, representatives: Sequence[str], answer: str) -> str | None:
    """The first representative that equals the answer mathematically. May take seconds; call it in a thread."""
    return next((other for other in representatives if grader.equal(other, answer)), None)


@lru_cache(4096)
def _key(answer: str) -> Fraction | str:
    return Fraction(answer) if _PLAIN.fullmatch(answer) else answer
