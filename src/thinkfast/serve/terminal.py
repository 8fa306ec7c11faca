"""`thinkfast solve`: problems in the terminal, the vote moving while chains of thought arrive."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast.errors import BadInput
from thinkfast.records import Failed

if TYPE_CHECKING:
    from thinkfast.scale.grade import Grader
    from thinkfast.serve.ballot import Outcome
    from thinkfast.serve.draw import Served
    from thinkfast.serve.judge import Judge
    from thinkfast.serve.vote import Plan

ROWS = 8
SPENT = 0.95  # of the budget: less is left for no chain
Show = Callable[[str, float, list[dict[str, Any]], int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to solve: see the options of the command."""

    budget: float
    strategy: str = "majority"
    n: int = 256
    temperature: float = 0.8
    slots: int = 64
    seed: int = 0
    reward: Path | None = None


def settings(
    budget: str, strategy: str | None, n: int, temperature: float, slots: int, seed: int, reward: Path | None
) -> Settings:
    """Checked settings of the command's options. Raises BadInput."""
    from thinkfast.engine.sampling import SamplingParams
    from thinkfast.serve.ballot import RANKED, Ballot, default_strategy
    from thinkfast.serve.draw import seconds_of

    strategy = strategy or default_strategy(reward is not None)
    Ballot(strategy, n)
    if reward is not None and strategy not in RANKED:
        raise BadInput(f"strategy {strategy!r} uses no reward model, expected {' or '.join(RANKED)} with --reward")
    SamplingParams(temperature=temperature, seed=seed)
    if slots < 1:
        raise BadInput(f"slots is {slots}, expected 1 or more")
    return Settings(seconds_of(budget), strategy, n, temperature, slots, seed, reward)


def solve_texts(directory: Path, texts: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Solves one problem after the other, each within its own budget; loading is outside it.

    Returns a document a problem: its text, the outcome, and the whole chain that is shown for the answer.
    Raises BadInput for an unusable model or a problem that leaves no room for an answer.
    """
    from thinkfast.model.checkpoint import read_config
    from thinkfast.scale.grade import Grader
    from thinkfast.serve.draw import open_model
    from thinkfast.serve.judge import open_judge

    with ExitStack() as stack:
        judge = None
        if settings.reward is not None:
            judge = open_judge(settings.reward)
            stack.callback(judge.close)
        served = open_model(directory, settings.slots, read_config(directory).max_position_embeddings)
        stack.callback(served.live.close)
        grader = stack.enter_context(Grader(seconds=1.0))
        return [_solve(served, text, settings, grader, judge) for text in texts]


def read_texts(problem: str | None, path: Path | None) -> list[str]:
    """The problems to solve: one given as it is, the `problem` of every row of a file, or the lines of stdin."""
    if problem is not None and path is not None:
        raise BadInput("a problem and --problems are both given, expected one of them")
    if path is not None:
        return [_row_problem(path, number, line) for number, line in _lines(path)]
    given = [problem] if problem not in (None, "-") else [line.strip() for line in sys.stdin]
    texts = [text for text in given if text is not None and text.strip()]
    if not texts:
        raise BadInput("no problem given: expected one as an argument, in --problems FILE, or a line each on stdin")
    return texts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise BadInput(f"{path}: no problem file there")
    found = [(number, line) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
    if not found:
        raise BadInput(f"{path}: no problems in it")
    yield from found


def _row_problem(path: Path, number: int, line: str) -> str:
    if path.suffix == ".txt":
        return line.strip()
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: row {number}: not valid JSON: {error.msg}") from error
    text = row.get("problem") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"{path}: row {number}: problem: expected text, got {text!r}")
    return text


def _solve(served: Served, text: str, settings: Settings, grader: Grader, judge: Judge | None) -> dict[str, Any]:
    from thinkfast.data.chat import render_prompt
    from thinkfast.engine.sampling import SamplingParams
    from thinkfast.serve.draw import EngineClosed
    from thinkfast.serve.judge import JudgeFailed
    from thinkfast.serve.vote import Plan

    prompt = tuple(render_prompt(served.tokenizer, text))
    room = served.live.capacity - len(prompt)
    if room < 1:
        raise BadInput(f"the problem has {len(prompt)} tokens, expected fewer than {served.live.capacity}")
    params = SamplingParams(room, settings.temperature, seed=settings.seed)
    now = time.monotonic()
    plan = Plan(text, prompt, params, settings.strategy, settings.n, now, now + settings.budget, judge=judge)
    try:
        with _display(text, settings.budget) as show:
            outcome = asyncio.run(_watch(served, plan, grader, show))
    except EngineClosed as error:
        raise Failed(f"the engine stopped: {error}") from None
    except JudgeFailed as error:
        raise Failed(f"the reward model failed: {error}") from None
    found = outcome.document()
    print(in_words(found, settings.n, settings.budget), file=sys.stdout, flush=True)
    chain = "" if outcome.chain is None else outcome.chain.text
    return {"problem": text, **found, "chain": chain}


async def _watch(served: Served, plan: Plan, grader: Grader, show: Show) -> Outcome:
    """Draws until the outcome, and shows the vote ten times a second while it does."""
    from thinkfast.serve.ballot import Chain
    from thinkfast.serve.vote import vote

    ballot = plan.ballot

    async def tick() -> None:
        while True:
            seconds = time.monotonic() - plan.started
            so_far = ballot.outcome(seconds, "")
            show(plan.strategy, seconds, so_far.votes, so_far.samples)
            await asyncio.sleep(0.1)

    shown = asyncio.create_task(tick())
    try:
        async with aclosing(vote(served, plan, grader)) as events:
            async for event in events:
                if not isinstance(event, Chain):
                    show(plan.strategy, event.seconds, event.votes, event.samples)
                    return event
                ballot.add(event)
    finally:
        shown.cancel()
    raise AssertionError("the vote ended without an outcome")


def in_words(found: dict[str, Any], most: int, budget: float) -> str:
    """The answer, its share of the votes, the samples, the seconds and why it was told then, in one line.

    most: chains there could have been, within so many seconds of `budget`.
    """
    if found["answer"] is None:
        return f"no answer: {found['samples']} chains ended in {found['seconds']:.2f} s"
    why = {
        "decided": "the vote is decided" if found["strategy"] == "adaptive" else f"no more of {most} can change it",
        "samples": f"all {most} are drawn",
        "deadline": "time is up" if found["seconds"] > SPENT * budget else "no other chain would end in time",
        "closed": "stopped",
    }
    share = f"{found['confidence']:.0%} of the {'weight' if found['strategy'] == 'weighted' else 'votes'}"
    told = f"{found['samples']} samples, {found['seconds']:.2f} s: {why[found['stopped']]}"
    return f"{found['answer']}  ({share}, {told})"


@contextmanager
def _display(problem: str, budget: float) -> Iterator[Show]:
    """The vote as it moves, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda strategy, seconds, votes, samples: None
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    title = Text(problem, style="bold", overflow="ellipsis", no_wrap=True)

    def picture(seconds: float, votes: list[dict[str, Any]], samples: int) -> Group:
        table = Table.grid(padding=(0, 1))
        most = sum(row["votes"] for row in votes) or 1
        for row in votes[:ROWS]:
            bar = ProgressBar(total=most, completed=row["votes"], width=40)
            table.add_row(Text(str(row["answer"])[:24], justify="right"), bar, str(row["votes"]))
        clock = Text(f"{samples} chains, {seconds:.1f} of {budget:g} s", style="dim")
        return Group(title, table, clock)

    with Live(picture(0.0, [], 0), console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        yield lambda strategy, seconds, votes, samples: live.update(picture(seconds, votes, samples), refresh=True)
