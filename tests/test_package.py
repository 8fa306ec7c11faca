"""What is built for others to install is whole, checked and light."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = ("build", "twine", "setuptools")
HEAVY = {"transformers", "gguf", "datasets", "ray", "fastapi", "uvicorn", "lm_eval", "mkdocs", "pytest"}
ABSENT = [name for name in TOOLS if importlib.util.find_spec(name) is None]
needs_tools = pytest.mark.skipif(
    bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}: the extra dev, with `make test`"
)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~!; ]", line)[0] for line in requirements}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built from a copy of the sources: the backend writes beside them."""
    root = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(root / "dist"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return root / "dist"


@needs_tools
def test_twine_accepts_both(dist: Path) -> None:
    built = sorted(str(path) for path in dist.iterdir())
    assert [path.endswith((".whl", ".tar.gz")) for path in built] == [True, True]
    command = [sys.executable, "-m", "twine", "check", "--strict", *built]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@needs_tools
def test_the_wheel_holds_the_whole_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        inside = set(wheel.namelist())
        meta = next(name for name in inside if name.endswith("METADATA"))
        metadata = message_from_bytes(wheel.read(meta))
    code = {name for name in inside if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0 and tracked.stdout:
        assert code == {line.removeprefix("src/") for line in tracked.stdout.splitlines()}
    assert {"thinkfast/py.typed", "thinkfast/assets/recipes/demo.toml", "thinkfast/ops/cpu/decode.cpp"} <= code
    assert set(metadata.get_all("Provides-Extra") or []) == set(PROJECT["optional-dependencies"])


@needs_tools
def test_the_sdist_has_what_a_build_needs_and_no_tests(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/thinkfast/ops/cpu/decode.cpp"} <= inside
    assert not [name for name in inside if name.startswith(("tests", "runs", "benchmarks"))]


def test_the_base_install_is_light() -> None:
    base = names(PROJECT["dependencies"])
    assert len(base) <= 12
    assert not base & HEAVY
    extras = set(PROJECT["optional-dependencies"])
    assert {"gpu", "data", "ray", "serve", "track", "export", "dev"} <= extras
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE))
    assert told == extras


def test_the_command_line_and_the_pipeline_load_no_extra() -> None:
    """What belongs to an extra is imported where it is used."""
    program = f"import sys, thinkfast.cli, thinkfast.pipeline; print(*({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
