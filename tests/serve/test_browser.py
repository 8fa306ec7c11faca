"""The page in a real browser: ask, watch, read, compare; on a desk and on a phone, by day and by night."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thinkfast.serve.app import Limits
from thinkfast.serve.draw import Served, open_model
from thinkfast.serve.keys import Key, Keys

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: the extra dev, with `make test`"
)
pytestmark = pytest.mark.browser

PATIENCE = 60_000
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def twin(talker: Path) -> Iterator[Served]:
    """A second model that comes to its answers on any machine."""
    opened = open_model(talker, 8, 1024, "twin")
    yield opened
    opened.live.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens a page; afterwards nothing may have gone wrong in it, and nothing been asked of another server."""
    complaints: list[str] = []
    contexts = []

    def go(address: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda asked: None if asked.url.startswith(address) else complaints.append(asked.url))
        page.goto(address)
        page.wait_for_load_state("networkidle")
        return page

    yield go
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith("data:")] == []


def ask(page: Any, *names: str, budget: str = "2") -> None:
    for box in page.locator("#models input").all():
        box.set_checked(box.get_attribute("value") in names)
    page.fill("#problem", "Ada has 3 pens. How many <b>pens</b>?")
    page.select_option("#budget", budget)
    page.click("#go")


def done(page: Any, count: int = 1) -> None:
    playwright.expect(page.locator(".run[data-state=done]")).to_have_count(count, timeout=PATIENCE)


def test_ask_watch_and_read(visit: Open, address: str) -> None:
    page = visit(address)
    page.evaluate(
        """() => {
          const seen = () => [document.querySelector('#go').textContent, document.querySelector('.run').dataset.state];
          new MutationObserver((_, watcher) => {
            if (document.querySelector('.chains li')) { window.first = seen(); watcher.disconnect(); }
          }).observe(document.querySelector('#runs'), { childList: true, subtree: true });
        }"""
    )
    ask(page, "talker", budget="10")
    done(page)
    assert page.evaluate("window.first") == ["Stop", None], "chains arrive before the answer is final"
    assert page.inner_text("#go") == "Think"
    assert page.inner_text(".answer").startswith("7\n")
    told = re.search(r"(\d+) % of the votes, (\d+) chains, [\d.]+ s, ", page.inner_text(".answer"))
    assert told is not None
    rows = [row.inner_text().split() for row in page.locator(".votes li").all()]
    assert [name for name, _ in rows] == ["7", "8"]
    votes = [int(count) for _, count in rows]
    assert sum(votes) == int(told[2])
    assert round(100 * votes[0] / sum(votes)) == int(told[1])
    assert page.inner_text("h3 .soft") == str(page.locator(".chains li").count())
    chain = page.locator(".chains li").first
    chain.locator("summary").click()
    assert re.fullmatch(r"(Notes)+#### [78]", chain.locator("pre").inner_text())
    answer = chain.locator("b").inner_text()
    assert chain.locator("pre").inner_text().endswith(f"#### {answer}")


def test_two_models_side_by_side(visit: Open, address: str) -> None:
    page = visit(address)
    assert page.locator("#models label").all_inner_texts() == ["talker", "rambler"]
    ask(page, "talker", "rambler", budget="1")
    done(page, 2)
    assert page.locator(".run h2").all_inner_texts() == ["talker", "rambler"]
    left, right = (page.locator(".run").nth(at).bounding_box() for at in (0, 1))
    assert right["x"] >= left["x"] + left["width"]
    assert page.locator(".run").nth(1).locator(".answer").inner_text().startswith("No answer in this time")


def test_everything_works_from_the_keyboard_and_stops(
    visit: Open, serve: Callable[..., str], models: list[Served], wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    page = visit(serve(Limits(answer=700, budget=3600.0, samples=10**9)))  # chains without end
    page.evaluate("document.querySelector('#budget option:checked').value = '3600'")
    page.focus("#problem")
    page.keyboard.type("three pens")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "budget"
    for box in page.locator("#models input").all():
        if box.is_checked() != (box.get_attribute("value") == "rambler"):
            box.focus()
            page.keyboard.press("Space")
    page.focus("#problem")
    page.keyboard.press("Control+Enter")
    page.locator(".chains li").first.wait_for()
    page.locator(".chains summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".chains details[open]").count() == 1
    page.focus("#go")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#go")).to_have_text("Think", timeout=PATIENCE)
    assert page.locator(".run[data-state=done]").count() == 0
    assert page.locator(".run[data-state=stopped]").count() == 1
    assert page.is_hidden("#trouble")
    wait_until(lambda: models[1].live.requests == 0)


def test_trouble_is_told(visit: Open, address: str) -> None:
    page = visit(address)
    page.fill("#problem", "pens " * 400)
    page.click("#go")
    playwright.expect(page.locator("#trouble")).to_contain_text(
        "messages: expected at most 300 tokens", timeout=PATIENCE
    )
    ask(page)
    playwright.expect(page.locator("#trouble")).to_have_text("Choose a model.")


def test_a_key_is_asked_for(visit: Open, serve: Callable[..., str]) -> None:
    import hashlib

    keys = Keys([Key(name="ada", sha256=hashlib.sha256(b"sesame").hexdigest())])
    page = visit(serve(keys=keys))
    page.locator("#key").wait_for()
    page.fill("#problem", "pens")
    page.fill("#key", "sesame")
    page.locator("#key").blur()
    page.locator("#models input").first.wait_for()
    ask(page, "talker", budget="10")
    done(page)


@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_phone(visit: Open, serve: Callable[..., str], twin: Served, width: int) -> None:
    page = visit(serve(None, None, twin), viewport={"width": width, "height": 800}, has_touch=True)
    ask(page, "talker", "twin", budget="10")
    done(page, 2)
    page.locator(".chains summary").first.tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for target in page.locator("#go, select, #models label").all():
        assert target.bounding_box()["height"] >= 40


def _luminance(colour: str) -> float:
    parts = [float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable(visit: Open, address: str, scheme: str, tmp_path: Path) -> None:
    page = visit(address, color_scheme=scheme)
    ask(page, "talker", budget="10")
    done(page)
    page.locator(".chains summary").first.click()
    pairs = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
          .filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
          .filter(node => node.getClientRects().length)
          .map(node => {
            let behind = node;
            while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            return [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor];
          })"""
    )
    assert len(pairs) > 20
    for colour, behind in {tuple(pair) for pair in pairs}:
        bright, dim = sorted((_luminance(colour), _luminance(behind)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (colour, behind)
    assert (_luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.05) == (scheme == "dark")
    for field in page.locator("textarea, select, input:visible").all():
        assert field.evaluate("node => node.labels.length") == 1, "every field has its label"
