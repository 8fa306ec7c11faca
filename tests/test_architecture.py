"""docs/architecture.md and the tree say the same."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "thinkfast"
TEXT = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = TEXT.split("## Floors and rooms")[1].split("\n## ")[0]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def test_the_floor_plan_names_every_module_and_no_other() -> None:
    named = {name.rsplit("/", 1)[-1] for name in re.findall(r"`([\w/]+\.py)`", ROOMS)}
    there = {path.name for path in MODULES}
    assert named - there == set(), "named but not there"
    assert there - named == set(), "there but not named"


def test_the_floor_plan_and_the_test_of_imports_agree() -> None:
    source = (Path(__file__).parent / "test_floors.py").read_text()
    floors = {name: int(floor) for name, floor in re.findall(r'^    "(\w+)": (\d),$', source, re.MULTILINE)}
    drawn = {name: int(floor) for floor, name in re.findall(r"^\*\*(\d)\*\* `(\w+)(?:/|\.py)`", ROOMS, re.MULTILINE)}
    assert drawn
    assert drawn == {name: floors[name] for name in drawn}
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= drawn.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_room_is_too_long_and_each_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert text.startswith('"""')
