"""The site builds without a warning, and what the tutorial tells people to type works, on smaller settings."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import thinkfast
from thinkfast.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIAL = (DOCS / "tutorial.md").read_text()
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
# The tutorial's recipe with less of everything; all else stays as it is printed.
SMALLER = (
    "problems.count=6",
    "problems.levels=[1]",
    "corpus.problems=60",
    "corpus.levels=[1]",
    "corpus.held_out=4",
    "align.tokens=1500",
    "align.batch_tokens=512",
    "distill.tokens=1500",
    "distill.batch_tokens=512",
    "sample.n=2",
    "sample.max_tokens=60",
    "sample.slots=[8]",
    "sample.trial_seconds=0.1",
    "compare.ks=[1,2]",
)


def test_the_tutorial_works_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: the extra dev, with `make test`")
    monkeypatch.chdir(tmp_path)
    ran = []
    for language, title, text in FENCE.findall(TUTORIAL):
        if title:
            Path(title).write_text(text)
        elif language == "python":
            exec(compile(text.replace("max_tokens=900", "max_tokens=40"), "tutorial.md", "exec"), {})
            ran.append("python")
        else:
            assert language == "sh"
            for line in text.splitlines():
                program, *words = shlex.split(line, comments=True)
                assert program == "thinkfast"
                less = [word for value in SMALLER for word in ("--set", value)] if words[0] == "run" else []
                status = main([words[0], *words[1:2], *less, *words[2:]])
                assert status == 0, (line, capsys.readouterr().err)
                ran.append(words[0])
    assert ran == ["doctor", "convert", "run", "run", "grade", "python", "export", "export"]
    assert Path("runs/tutorial/report/index.html").is_file()
    assert Path("exports/hybrid/config.json").is_file()
    card = Path("exports/hybrid/README.md").read_text()
    for words in ("pass@1", "tokens per second", "KL divergence", "trained on | 60 documents", "On ", "bundled"):
        assert words in card
    summary = json.loads(Path("runs/tutorial/summary.json").read_text())
    assert set(summary["models"]) == {"teacher", "hybrid"}
    assert "right answer: " in capsys.readouterr().out


def test_the_tutorial_shrinks_only_what_its_recipe_has() -> None:
    printed = next(tomllib.loads(text) for _, title, text in FENCE.findall(TUTORIAL) if title)
    for setting in SMALLER:
        section, key = setting.split("=")[0].split(".")
        assert section in printed
        assert key in printed[section] or key == "trial_seconds"


def test_the_time_that_the_tutorial_states_was_measured_on_what_is_printed() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "tutorial.json").read_text())
    printed = []
    for language, title, text in FENCE.findall(TUTORIAL):
        if not title:
            printed += ["the Python program"] if language == "python" else text.splitlines()
    assert [step["step"] for step in measured["steps"]] == printed
    run = max(step["seconds"] for step in measured["steps"])
    assert f"take {measured['seconds'] / 60:.1f} minutes together, {round(run)} seconds of them the run" in TUTORIAL


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("mkdocs-material or mkdocstrings is not installed: the extra dev, with `make test`")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\n\n")[0]
    for page in DOCS.glob("*.md"):
        assert f": {page.name}\n" in navigation + "\n"
        assert (site / page.with_suffix(".html").name).stat().st_size > 2000


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name, home in thinkfast._HOMES.items():
        assert f'id="{home}.{name}"' in page, name
        if name != "BadInput":
            text = (getattr(thinkfast, name).__doc__ or "").split("\n")[0].split("`")[0].strip()[:40]
            assert text.split("->")[0].split("<")[0].split("'")[0].strip() in page, name


def test_the_figures_are_inlined_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    concepts = (site / "concepts.html").read_text()
    for figure in (DOCS / "images").glob("*.svg"):
        title = re.search(r'aria-label="([^"]+)"', figure.read_text())
        assert title
        assert title[1] in concepts, figure.name
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|icon|preconnect)"[^>]*href="([^"]+)"', page.read_text())
        assert loaded
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page.name


def test_no_figure_is_without_a_page() -> None:
    pages = "".join(path.read_text() for path in [*DOCS.glob("*.md"), ROOT / "README.md"])
    for figure in (DOCS / "images").iterdir():
        assert figure.name in pages
