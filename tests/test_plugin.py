"""What torch calls for the harness' sake: nothing in other programs, no failure whatever harness there is."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from thinkfast import plugin

ROOT = Path(__file__).parents[1]
# A harness with the registry of 0.4.13, in which `--model` looks a name up.
REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        assert name not in self
        self[name] = target
model_registry = Registry()
"""


def in_process(path: Path, program: str) -> list[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def harness(path: Path, registry: str) -> None:
    for name, text in {"": "", "api": "", "models": "", "api/registry.py": registry}.items():
        file = path / "lm_eval" / name
        if file.suffix != ".py":
            file.mkdir(parents=True)
            file /= "__init__.py"
        file.write_text(text)


def test_the_entry_points_lead_to_what_is_there() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups["lm_eval.models"] == {plugin.NAME: plugin.MODEL}
    assert groups["torch.backends"] == {plugin.NAME: "thinkfast.plugin:register"}
    assert (ROOT / "src" / "thinkfast" / "harness.py").read_text().count("\nclass ThinkfastLM(") == 1


def test_in_the_harness_the_name_is_registered_once(tmp_path: Path) -> None:
    harness(tmp_path, REGISTRY)
    program = "import lm_eval, thinkfast.plugin as p; p.register(); p.register()\n"
    program += "from lm_eval.api.registry import model_registry as r; print(*r.items(), 'torch' in sys.modules)"
    assert in_process(tmp_path, program) == ["('thinkfast',", "'thinkfast.harness:ThinkfastLM')", "False"]


@pytest.mark.parametrize("registry", ["MODEL_REGISTRY = {}", "import nothing_there"])
def test_an_unknown_harness_is_left_alone(tmp_path: Path, registry: str) -> None:
    harness(tmp_path, registry)
    assert in_process(tmp_path, "import lm_eval, thinkfast.plugin as p; p.register(); print('fine')") == ["fine"]


def test_the_command_without_the_harness_says_what_to_install() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["thinkfast-lm-eval"] == "thinkfast.plugin:main"
    program = "import sys; sys.modules['lm_eval'] = None; import thinkfast.plugin as p; p.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "thinkfast: lm_eval is not installed: pip install 'thinkfast[eval]'\n"


def test_in_other_programs_nothing_happens(tmp_path: Path) -> None:
    harness(tmp_path, REGISTRY)
    program = "import thinkfast.plugin as p; p.register(); print('lm_eval' in sys.modules)"
    assert in_process(tmp_path, program) == ["False"]
