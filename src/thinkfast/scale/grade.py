"""Which answers are mathematically equal, and which completions therefore vote together.

Numbers are compared exactly. Everything else goes to math-verify in processes of their own, each of which the kernel
ends when one comparison exceeds its time, so that no answer can hold up or bring down the caller.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from types import TracebackType
from typing import Self

from thinkfast.data.answers import extract_answer as extract_answer
from thinkfast.data.answers import tidy

_STARTUP_SECONDS = 120.0
_PATIENCE = 4.0  # seconds on the wall, for a second of the limit, after which a blocked comparison is given up
_IDLE_SECONDS = 1e-3  # processor time below which a process did nothing in a while
_NUMBER = re.compile(r"([+-]?)(\d{1,200}(?:\.\d{0,200})?|\.\d{1,200})(?: ?/ ?([+-]?\d{1,200}(?:\.\d{1,200})?))?")
_FRACTION = re.compile(r"([+-]?)\\[dtc]?frac *(?:\{([+-]?\d{1,200})\}|(\d)) *(?:\{([+-]?\d{1,200})\}|(\d))")
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin\{align")
_NOT_ONE_EQUATION = re.compile(r"[<>,;:!$\n]|\\(?:leq?|geq?|neq?|lt|gt|in|begin|text)(?![a-z])|[A-Za-z]{3}")
_UNKNOWN_TERM = re.compile(r"\d[a-z]|[a-z][^=]*[-+^]|[-+][^=]*[a-z]", re.IGNORECASE)


def _number(text: str) -> Fraction | None:
    """Exact value of a tidied integer, decimal or fraction; None for everything else."""
    found = _NUMBER.fullmatch(text)
    if found:
        sign, top, bottom = found.groups()
    else:
        found = _FRACTION.fullmatch(text)
        if not found:
            return None
        sign, top, bottom = found[1], found[2] or found[3], found[4] or found[5]
    divisor = Fraction(bottom or 1)
    if not divisor:
        return None
    value = Fraction(top) / divisor
    return -value if sign == "-" else value


def plain_key(text: str) -> Fraction | str:
    """What a tidied answer is without any algebra: its exact value where it is a plain number, else its text."""
    value = _number(text)
    return text if value is None else value


def _is_relation(text: str) -> bool:
    """Whether a text is an equation between unknowns, which has no value that a bare expression could equal.

    "x = 5" and "f(x) = 2x" name a value and "2 + 3 = 5" computes one; "2x + z = 1" and "7 = 11a + c" do neither.
    """
    bare = re.sub(r"\\(?:left|right|sqrt|[dt]?frac|cdot|times|pi)(?![a-z])", " ", text)
    sides = re.sub(r"_\{?\w+\}?", "", bare).split("=")
    if len(sides) != 2 or _NOT_ONE_EQUATION.search(bare):
        return False
    # A lone name, f(x) among them, is what the other side gives the value of.
    if any(re.fullmatch(r"\s*\\?[A-Za-z]+'?\s*(?:\([^()]*\))?\s*", side) for side in sides):
        return False
    return any(_UNKNOWN_TERM.search(side) for side in sides)


def equivalent(gold: str, prediction: str) -> bool:
    """Whether two answers are mathematically equal; symmetric; may be called from any thread.

    Plain numbers are equal when they are the same rational number. Otherwise the answers are equal when math-verify
    accepts either as an answer to the other within 5 seconds of processor time. An empty answer equals nothing.
    """
    return _shared_grader().equal(gold, prediction)


@lru_cache(maxsize=1)
def _shared_grader() -> "Grader":
    grader = Grader()
    atexit.register(grader.close)
    return grader


class Grader:
    """Compares and classes answers. Use as a context manager, or call `close`; safe to share between threads.

    seconds: processor time that one comparison may take; what takes longer is not equal. memory_mb: address space of
    a worker process. workers: processes, each started when first needed.
    """

    def __init__(self, seconds: float = 5.0, memory_mb: int = 2048, workers: int = 1) -> None:
        self._seconds = seconds
        self._memory_mb = memory_mb
        self._size = workers
        self._workers: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._workers.put(None)
        self._verdicts: dict[tuple[str, str], bool | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes once the comparisons under way are done. A later comparison starts new ones."""
        for worker in [self._workers.get() for _ in range(self._size)]:
            if worker is not None:
                worker.stop()
            self._workers.put(None)

    def equal(self, gold: str, prediction: str) -> bool:
        """`equivalent`, with the limits of this grader."""
        gold, prediction = tidy(gold), tidy(prediction)
        return bool(gold and prediction and self._compare(gold, prediction))

    def grade(self, gold: str, answers: Sequence[str | None]) -> tuple[list[int], list[bool]]:
        """Answer class and verdict of every answer to one problem.

        Returns (classes, correct). Classes are numbered in order of first appearance, -1 for None. An answer joins the
        first class whose representative it equals, that of the gold answer before all others: classes never overlap,
        do not depend on the order of the answers, and correct is `equal(gold, answer)`, the same for a whole class.
        An answer is given up at the first comparison that exceeds its time, and is then in a class of its own.
        """
        texts = [tidy(answer) if answer is not None else "" for answer in answers]
        gold = tidy(gold)
        keys = {text: plain_key(text) for text in [gold, *texts] if text}
        home = {keys[gold]: gold} if gold else {}
        representatives = [gold] if gold else []
        for text in sorted(keys, key=lambda text: (isinstance(keys[text], str), text)):
            if keys[text] in home:
                continue
            match, in_time = self._first_equal(representatives, text)
            home[keys[text]] = text if match is None else match
            if match is None and in_time:
                representatives.append(text)
        numbers: dict[str, int] = {}
        classes = [numbers.setdefault(home[keys[text]], len(numbers)) if text else -1 for text in texts]
        return classes, [bool(text and gold) and home[keys[text]] == gold for text in texts]

    def _first_equal(self, representatives: Sequence[str], text: str) -> tuple[str | None, bool]:
        """The first representative equal to text, and False when text exceeded its time before one was found."""
        for representative in representatives:
            verdict = self._compare(representative, text)
            if verdict is None:
                return None, False
            if verdict:
                return representative, True
        return None, True

    def _compare(self, gold: str, prediction: str) -> bool | None:
        """Whether two tidied answers are equal; None when that takes too long or too much memory."""
        first, second = plain_key(gold), plain_key(prediction)
        if first == second or (isinstance(first, Fraction) and isinstance(second, Fraction)):
            return first == second
        if (_is_relation(gold) and "=" not in prediction) or (_is_relation(prediction) and "=" not in gold):
            return False
        pair = (min(gold, prediction), max(gold, prediction))
        if pair not in self._verdicts:
            self._verdicts[pair] = self._ask(pair)
        return self._verdicts[pair]

    def _ask(self, pair: tuple[str, str]) -> bool | None:
        worker, verdict = self._workers.get(), None
        try:
            if worker is not None and not worker.alive():
                worker.stop()
                worker = None
            if worker is None:
                worker = _Worker(self._seconds, self._memory_mb)
            verdict = worker.ask(pair)
        finally:
            # Also after an interrupt: a reply that nobody read must not be taken for the next one.
            if verdict is None and worker is not None:
                worker.stop()
            self._workers.put(None if verdict is None else worker)
        return verdict


class _Worker:
    """This file run as a program: reads pairs of answers, writes verdicts, ends when it takes too long."""

    def __init__(self, seconds: float, memory_mb: int) -> None:
        # A fixed hash seed: the order of sets inside sympy must not decide a verdict.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(seconds), str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            text=True,
            encoding="utf-8",
        )
        if self._read() != "ready":
            self.stop()
            raise RuntimeError(f"no grading process: `{sys.executable} -c 'import math_verify'` tells why")

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, pair: tuple[str, str]) -> bool | None:
        """The verdict, or None when the process ended over it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(pair) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return {"1": True, "0": False}.get(self._read())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _serve(seconds: float, memory_mb: int) -> None:
    """The worker: a JSON line with two answers in, a line 1 or 0 out.

    The time limit is a timer whose signal nobody handles, so that the kernel ends the process in the middle of any
    computation, also when the process that asked is gone. Processor time counts, so that a busy machine changes no
    verdict; `_limited` also ends what does not even compute.
    """
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may be taken for a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    with _limited(_STARTUP_SECONDS):
        _verify(r"$\frac{x}{2}$", "$0.5x$")  # the first parse is slow and belongs to no answer
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        with _limited(seconds):
            equal = _verify(*json.loads(line))
        print(int(equal), file=verdicts, flush=True)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends the process when the block takes more than `seconds` of processor time, or when it is blocked.

    Blocked is what has used no processor time twice in a row over half of `_PATIENCE` times `seconds` on the wall. A
    process that only waits for a core, or that was stopped for a while, goes on at its next look.
    """
    period, spent, idle = _PATIENCE * seconds / 2, time.process_time(), 0

    def look(number: int, frame: object) -> None:
        nonlocal spent, idle
        now = time.process_time()
        idle = idle + 1 if now - spent < _IDLE_SECONDS else 0
        if idle == 2:
            os._exit(1)
        spent = now
        signal.setitimer(signal.ITIMER_REAL, period)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, period)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _verify(first: str, second: str) -> bool:
    """math-verify in both directions, since its own relation is not symmetric."""
    from math_verify import parse, verify

    one, two = (
        parse(text if _DELIMITED.search(text) else f"${text}$", parsing_timeout=None) for text in (first, second)
    )
    return bool(verify(one, two, timeout_seconds=None) or verify(two, one, timeout_seconds=None))


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
