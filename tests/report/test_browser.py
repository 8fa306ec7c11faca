"""The page in a real browser: what a reader does with it, on a desk and on a phone, by day and by night."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thinkfast.records import read_samples, read_scores
from thinkfast.report import write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: the extra dev, with `make test`"
)
pytestmark = pytest.mark.browser

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def address(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(demo_run, tmp_path_factory.mktemp("page")).as_uri()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Open]:
    """Opens the page; afterwards nothing may have been said on the console or asked of a network."""
    complaints: list[str] = []
    contexts = []

    def go(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url == address else complaints.append(request.url))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith("data:")] == []


def _set_time(page: Any, step: int) -> float:
    page.evaluate(
        "step => { const r = document.getElementById('budget'); r.value = step; r.dispatchEvent(new Event('input')); }",
        step,
    )
    data = json.loads(page.inner_text("#data"))["browser"]
    return float(data["low"] * (data["high"] / data["low"]) ** (step / 120))


def _counts(run: Path, model: str, problem: str, tau: float) -> tuple[int, Counter[str]]:
    """Samples that ended by tau, and the votes of each answer, straight from the run's files."""
    ended = {
        row.sample_index
        for row in read_samples(run / "samples" / model)
        if row.problem_id == problem and row.t_end <= tau * 40
    }
    scores = [s for s in read_scores(run / "scores" / f"{model}.parquet") if s.problem_id == problem]
    votes = Counter(str(s.answer) for s in scores if s.sample_index in ended and s.answer_class >= 0)
    return len(ended), votes


def test_the_clock_changes_the_vote(visit: Open, demo_run: Path) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    seen = set()
    for step in (0, 30, 77, 120):
        tau = _set_time(page, step)
        for model in ("teacher", "pure", "hybrid"):
            box = page.locator(f"section[aria-label='Vote of {model}']")
            count, votes = _counts(demo_run, model, "demo-0000", tau)
            assert f"{count} of " in box.inner_text()
            shown = {}
            for row in box.locator(".bar-row:has(.fill)").all():
                answer, number = row.inner_text().split("\n")[0], re.findall(r"(\d+)( ✓)?$", row.inner_text())[0][0]
                shown[answer] = int(number)
            assert shown == {answer: votes[answer] for answer in shown}
            assert sorted(shown.values(), reverse=True) == sorted(votes.values(), reverse=True)[: len(shown)]
            assert len(shown) == min(4, len(votes))
            seen.add((model, count))
        assert page.inner_text("#now").endswith("\u00a0s")
    assert len(seen) == 12


def test_choosing_a_problem_shows_its_chains(visit: Open, demo_run: Path) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    _set_time(page, 120)
    page.locator("#list button").nth(7).click()
    assert page.inner_text("#meta").startswith("demo-0007")
    page.locator("#tabs label", has_text="hybrid").click()
    rows = [row for row in read_samples(demo_run / "samples" / "hybrid") if row.problem_id == "demo-0007"]
    rows = sorted((row for row in rows if row.t_end <= 1.6 * 40), key=lambda row: row.t_end)
    chains = page.locator("#chains li")
    assert chains.count() == len(rows)
    assert chains.nth(0).locator(".chain").inner_text() == rows[0].text
    chains.nth(3).locator("summary").click()
    assert chains.nth(3).locator(".chain").inner_text() == rows[3].text
    graded = {
        s.sample_index: s.correct
        for s in read_scores(demo_run / "scores" / "hybrid.parquet")
        if s.problem_id == "demo-0007"
    }
    words = [chain.locator(".state").inner_text() for chain in chains.all()]
    assert ["right" in word for word in words] == [graded[row.sample_index] for row in rows]
    assert page.locator("#question b").count() == 0


def test_filters_agree_with_the_marks(visit: Open) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    everything = page.locator("#list li").count()
    assert everything == 40
    page.select_option("#outcome", "only-1")
    marks = page.locator("#list .marks").all_inner_texts()
    assert 0 < len(marks) < everything
    for text in marks:
        assert "pure right." in text
        assert "teacher right." not in text
        assert "hybrid right." not in text
    page.select_option("#outcome", "")
    page.select_option("#level", "2")
    assert page.locator("#list li").count() == 10
    page.fill("#search", "demo-0005")
    assert page.locator("#list li").count() == 1
    page.fill("#search", "nothing of the kind")
    assert page.inner_text("#found") == "0 of 40 problems"


def test_everything_works_from_the_keyboard(visit: Open) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    page.focus("[data-plot=coverage_time]")
    page.keyboard.press("End")
    spoken = page.get_attribute("[data-plot=coverage_time]", "aria-valuetext")
    assert spoken.startswith("1.6\u00a0s per problem; teacher ")
    assert "samples" in page.locator(".plot").first.locator(".readout").inner_text()
    page.focus("#budget")
    before = page.inner_text("#now")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#now") != before
    page.focus("#list li:nth-child(1) button")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.inner_text("#meta").startswith("demo-0001")
    page.focus("#tabs input:checked")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#tabs input:checked').value") == "1"
    page.locator("#chains summary").first.focus()
    assert page.locator("#chains details[open]").count() == 1
    page.keyboard.press("Enter")
    assert page.locator("#chains details[open]").count() == 0


def test_the_budget_moves_the_figures_too(visit: Open, demo_run: Path) -> None:
    page = visit()
    tau = _set_time(page, 70)
    seconds = json.loads((demo_run / "curves" / "curves.json").read_text())["seconds"]
    nearest = min(range(len(seconds)), key=lambda i: abs(math.log(seconds[i] / tau)))
    for name in ("coverage_time", "majority_time"):
        assert page.get_attribute(f'[data-plot="{name}"]', "aria-valuenow") == str(nearest)
    assert page.get_attribute('[data-plot="coverage_k"]', "aria-valuenow") == "0"
    with page.expect_download() as download:
        page.click('a[download="curves.csv"]')
    assert Path(download.value.path()).read_text().startswith('"axis","x","model","measure"')


def test_rewards_decide_where_the_reader_wants_it(
    browser: Any, make_run: Any, add_rewards: Callable[[Path], None], tmp_path: Path
) -> None:
    run = make_run()
    add_rewards(run)
    page = browser.new_page()
    page.goto(write_report(run, tmp_path / "page").as_uri())
    _set_time(page, 120)
    shares = {}
    for how in ("majority", "weighted", "best_of_n"):
        page.select_option("#how", how)
        shares[how] = [int(n) for n in re.findall(r"(\d+)\s%", page.inner_text("#tally"))]
    # Right samples alone have rewards above 0: whoever has one right sample wins by the best reward.
    assert all(best >= voted for best, voted in zip(shares["best_of_n"], shares["majority"], strict=True))
    assert shares["best_of_n"] != shares["majority"]
    assert re.search(r"reward -?\d", page.inner_text("#chains"))
    page.close()


def test_time_runs_and_stops(visit: Open) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    _set_time(page, 10)
    page.click("#play")
    playwright.expect(page.locator("#budget")).not_to_have_value("10")
    page.click("#play")
    assert page.get_attribute("#play", "aria-pressed") == "false"
    stopped = page.input_value("#budget")
    assert int(stopped) > 10
    page.wait_for_timeout(250)
    assert page.input_value("#budget") == stopped


def test_the_page_ends_with_its_footer(visit: Open) -> None:
    page = visit(viewport={"width": 1000, "height": 800})
    # Long enough that the list of problems scrolls: what it hides must not lengthen the page.
    page.evaluate("document.querySelector('#list').style.maxHeight = '4rem'")
    below = "document.documentElement.scrollHeight - document.querySelector('footer').getBoundingClientRect().bottom"
    assert page.evaluate(below) < 100


@pytest.mark.parametrize("width", [320, 380, 700, 1000])
def test_no_width_scrolls_sideways(visit: Open, width: int) -> None:
    page = visit(viewport={"width": width, "height": 800})
    for details in page.locator("details").all():
        details.evaluate("node => { node.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    narrow = page.locator("svg.narrow").first.is_visible()
    assert narrow == (width < 608)
    assert page.locator("svg.wide").first.is_visible() != narrow


def _luminance(colour: str) -> float:
    parts = [float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable(visit: Open, scheme: str) -> None:
    page = visit(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    paper = _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.05) == (scheme == "dark")
    colours = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
          .filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
          .filter(node => node.getClientRects().length)
          .map(node => node instanceof SVGElement ? getComputedStyle(node).fill : getComputedStyle(node).color)"""
    )
    assert len(colours) > 300
    for colour in set(colours):
        bright, dim = sorted((_luminance(colour), paper), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, colour
