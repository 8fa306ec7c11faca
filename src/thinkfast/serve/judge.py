"""A reward model beside the engine: it scores chains of thought as they end, and knows how long that takes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from thinkfast.errors import BadInput

Score = Callable[[str, Sequence[str]], Sequence[float]]
"""A problem and completions of it to a score each."""

NEWEST = 0.25  # weight of the newest batch in the pace
BATCH_SECONDS = 0.2  # a batch cannot be called off
TRIAL = ("How many pens?", "One pen and two pens are three pens.\n#### 3")


class JudgeFailed(Exception):
    """The reward model raised, or gave a score that is no finite number."""


class Judge:
    """Scores for every request in one thread.

    soft: scores are log-probabilities or unbounded: votes weigh exp(score) instead of the score itself.
    pace: seconds a character of problem and completion, measured on a trial and on every batch since.
    """

    def __init__(self, score: Score, soft: bool) -> None:
        self.soft, self.pace = soft, 0.0
        self._score = score
        self._thread = ThreadPoolExecutor(1, "thinkfast-judge")
        self._queued = 0
        for _ in range(2):  # the first call of a model is slow
            self.pace = 0.0
            self._timed(TRIAL[0], TRIAL[1:])

    def _timed(self, problem: str, texts: Sequence[str]) -> Sequence[float]:
        started = time.monotonic()
        scores = self._score(problem, texts)
        pace = (time.monotonic() - started) / characters(problem, texts)
        self.pace = pace if self.pace == 0 else (1 - NEWEST) * self.pace + NEWEST * pace
        return scores

    def seconds(self, problem: str, texts: Sequence[str]) -> float:
        """How long it will be until these are scored, behind what other requests have brought."""
        return (self._queued + characters(problem, texts)) * self.pace

    def batch(self, problem: str, texts: Sequence[str]) -> int:
        """How many of the first of these, one or more, are scored together."""
        each = max(characters(problem, [text]) for text in texts) * self.pace
        return min(len(texts), max(1, int(BATCH_SECONDS / each)))

    async def scores(self, problem: str, texts: Sequence[str]) -> list[float]:
        """A score for each completion. Raises JudgeFailed."""
        size = characters(problem, texts)
        self._queued += size
        try:
            loop = asyncio.get_running_loop()
            found = [float(score) for score in await loop.run_in_executor(self._thread, self._timed, problem, texts)]
        except Exception as error:
            raise JudgeFailed(f"{type(error).__name__}: {error}") from error
        finally:
            self._queued -= size
        strange = next((score for score in found if not math.isfinite(score)), None)
        if strange is not None:
            raise JudgeFailed(f"a score is {strange}")
        return found

    def close(self) -> None:
        """Ends the thread when the batch it is at is done."""
        self._thread.shutdown(cancel_futures=True)


def characters(problem: str, texts: Sequence[str]) -> int:
    """What a reward model reads for some completions of a problem, as far as its time goes."""
    return sum(len(problem) + len(text) + 1 for text in texts)


def open_judge(directory: Path) -> Judge:
    """A verifier of train-reward, or a published reward model whose last step counts.

    Raises BadInput for a directory that is neither.
    """
    from thinkfast.data.chat import render_prompt
    from thinkfast.scale.reward import PREFERENCE, RewardModel, fold_steps
    from thinkfast.scale.verifier import NOTE, Example, load_verifier, score_examples

    if not directory.is_dir():
        raise BadInput(f"{directory}: no such reward model directory")
    if (directory / NOTE).is_file():
        verifier, tokenizer = load_verifier(directory)

        def verify(problem: str, texts: Sequence[str]) -> Sequence[float]:
            prompt = tuple(render_prompt(tokenizer, problem))
            examples = [Example(prompt, (*tokenizer.encode(text), tokenizer.eos_id), False) for text in texts]
            totals = {place: total for place, total, _, _ in score_examples(verifier, examples, tokenizer.pad_id)}
            return [totals[place] for place in range(len(texts))]

        return Judge(verify, soft=True)
    model = RewardModel(directory)

    def judge(problem: str, texts: Sequence[str]) -> Sequence[float]:
        steps = [model.steps(problem, text) for text in texts]
        return [fold_steps(each, "last") if each else 0.0 for each in steps]

    return Judge(judge, soft=model.layout == PREFERENCE)
