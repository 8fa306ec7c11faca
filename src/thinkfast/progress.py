"""Progress of long work, on stderr: a bar with an ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from thinkfast import ranks

Update = Callable[[float, str], None]
"""Takes how much is done, in the unit of the bar's total, and a short text to show beside it."""

SECONDS_BETWEEN_LINES = 15.0


def silent(done: float, text: str = "") -> None:
    """An `Update` that shows nothing."""


@contextmanager
def bar(title: str, total: float) -> Iterator[Update]:
    """Shows `title` and how much of `total` is done while the block runs; the yielded function moves it."""
    if ranks.current().rank:
        yield silent
        return
    if sys.stderr.isatty():
        with _terminal_bar(title, total) as update:
            yield update
        return
    last = time.monotonic()
    first: tuple[float, float] | None = None

    def report(done: float, text: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        # Resumed work begins with much done already, at no cost.
        first = first or (now, done)
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        made = done - first[1]
        left = f", {(now - first[0]) / made * (total - done):.0f} s left" if made > 0 else ""
        print(f"{title}: {done / total:.0%}{left} {text}".rstrip(), file=sys.stderr, flush=True)

    yield report


@contextmanager
def _terminal_bar(title: str, total: float) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, text="")

        def move(done: float, text: str = "") -> None:
            progress.update(task, completed=done, text=text)

        yield move
