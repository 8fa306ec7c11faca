"""Every recipe that is shipped reads, and what the documents tell people to type exists."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from thinkfast import runtime
from thinkfast.cli import app
from thinkfast.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
DOCUMENTS = [ROOT / "README.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def typed(document: Path, program: str) -> list[list[str]]:
    """The words of every command line of `program` in a document's code."""
    text = document.read_text().replace("\\\n", " ")  # lines that go on
    if document.suffix == ".md":
        blocks = re.findall(r"^```(?:bash|sh|console|text)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = "\n".join(blocks).splitlines() + re.findall(r"`(" + program + r" [^`]+)`", text)
    else:
        lines = text.splitlines()
    found = re.findall(rf"^[\s$@]*(?:\S*/)?({program} [^#|&;\n]+)", "\n".join(lines), re.MULTILINE)
    return [shlex.split(line)[1:] for line in found]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_reads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.models[0] == "teacher"
    assert max(recipe.compare.ks) <= recipe.sample.n


def test_the_recipes_are_those_of_the_package() -> None:
    inside = runtime.ASSETS / "recipes"
    assert {path.name for path in RECIPES} == {path.name for path in inside.glob("*.toml")} != set()
    for path in RECIPES:
        assert path.read_text() == (inside / path.name).read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(document: Path) -> None:
    for words in typed(document, "thinkfast"):
        name = words[0]
        if name.startswith("-"):
            continue
        assert name in COMMANDS, f"{document.name}: thinkfast {' '.join(words)}"
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{document.name}: thinkfast {' '.join(words)}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in typed(document, "make"):
        assert set(words) <= targets, f"{document.name}: make {' '.join(words)}"


def test_the_readme_shows_the_demo() -> None:
    assert ["demo"] in [
        words[:1] for words in typed(ROOT / "README.md", "thinkfast") + typed(ROOT / "README.md", "make")
    ]
