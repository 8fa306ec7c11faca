"""The rules of the house: who may import whom, and what may be imported at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "thinkfast"
FLOORS = {
    "cli": 8,
    "spending_cli": 7,
    "options": 5,
    "pipeline": 6,
    "report": 5,
    "serve": 5,
    "results": 5,
    "ranking": 6,
    "rewards": 6,
    "retention": 6,
    "spending": 6,
    "doctor": 5,
    "harness": 5,
    "plugin": 5,
    "stages": 4,
    "rounds": 4,
    "students": 5,
    "forecast": 5,
    "scale": 4,
    "distill": 4,
    "bench": 4,
    "engine": 3,
    "student": 3,
    "export": 3,
    "model": 2,
    "data": 2,
    "ops": 1,
    "errors": 1,
    "ranks": 1,
    "records": 1,
    "recipe": 1,
    "sections": 1,
    "runtime": 1,
    "progress": 1,
}
LEAN = ("ops", "model", "engine")
WITHOUT_TORCH = ("scale.aggregate", "scale.estimate", "scale.budget", "scale.ranked", "report")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def name_of(path: Path) -> str:
    """The module's name without the package's: `scale.sample`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions, type hints included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "thinkfast":
                found |= {f"thinkfast.{alias.name}" for alias in node.names}
            else:
                found.add(module)
    return found


def rooms(path: Path) -> set[str]:
    """The rooms (packages or single modules of the house) that a file imports from."""
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("thinkfast.")}
    return inside - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    room = name_of(path).split(".")[0]
    assert room in FLOORS, f"{room} has no floor"
    for other in rooms(path) - {room}:
        lower = FLOORS[other] < FLOORS[room]
        ground = FLOORS[other] == FLOORS[room] == 1 and room != "ops" and other != "ops"
        assert lower or ground, f"{name_of(path)} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


def test_distillation_and_the_engine_do_not_know_each_other() -> None:
    for path in MODULES:
        room = name_of(path).split(".")[0]
        assert not (room == "distill" and "engine" in rooms(path)), path
        assert not (room == "engine" and "distill" in rooms(path)), path


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p).split(".")[0] in LEAN], ids=name_of)
def test_the_lean_rooms_need_torch_numpy_and_safetensors_alone(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"thinkfast"}
    kernels = {"triton"} if name_of(path).startswith("ops.triton") else set()
    assert outside <= {"torch", "numpy", "safetensors"} | kernels
    assert rooms(path) <= {*LEAN, "errors"}


def test_nothing_loads_triton_before_a_model_stands_on_a_gpu() -> None:
    program = "import sys, thinkfast.engine.engine, thinkfast.model.decoder; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p).startswith(WITHOUT_TORCH)], ids=name_of)
def test_statistics_and_report_import_no_torch(path: Path) -> None:
    assert "torch" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize(
    "module",
    [
        *("", ".cli", ".pipeline", ".results", ".rewards", ".report"),
        *(".scale.aggregate", ".scale.estimate", ".scale.budget", ".scale.ranked"),
    ],
)
def test_importing_it_loads_no_torch(module: str) -> None:
    program = f"import sys, thinkfast{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_public_names_are_found_where_they_live() -> None:
    import thinkfast

    assert set(thinkfast.__all__) == set(thinkfast._HOMES)
    for name in thinkfast.__all__:
        assert getattr(thinkfast, name).__module__ == thinkfast._HOMES[name], name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(thinkfast, "nonsense")  # noqa: B009 - the name does not exist
