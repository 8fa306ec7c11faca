"""The model card tells what the run's files tell, and says so where they tell nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from thinkfast.export.card import model_card, run_of

Make = Callable[..., Path]
MACHINE = {"cores": 3, "processor": "A Processor"}
STUDENT = {
    "command": "thinkfast run r.toml",
    "code": "0.1.0 (abc)",
    "machine": MACHINE,
    "settings": {"stages": ["align"], "align": {"tokens": 77, "lr": 0.5}, "sft": {"tokens": 88}, "ranking": None},
    "notes": {"train": {"align": {"tokens": 77000, "seconds": 5.2}}, "kl": 0.5, "result": "KL 0.5 nats a token"},
}
SAMPLED = {
    "machine": MACHINE,
    "settings": {"temperature": 0.8, "max_tokens": 900, "seconds": 30.0},
    "notes": {"engine": {"backend": "native"}},
}
FIGURES = {"pass@1": 0.25, "majority": 0.0, "coverage": 0.75, "tokens_per_second": 4321.4, "slots": 16}


def written(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


@pytest.fixture
def student(make_model: Make, tmp_path: Path) -> Path:
    """A student in a run with the files that the pipeline leaves there, but the summary."""
    run, path = tmp_path / "run", tmp_path / "run" / "models" / "one"
    shutil.copytree(make_model("groups"), path)
    written(path / "run.json", STUDENT)
    written(run / "corpus" / "run.json", {"settings": {"seed": 1, "path": None}, "notes": {"result": "70 documents"}})
    written(run / "problems" / "run.json", {"settings": {"seed": 2}, "notes": {"result": "20 problems"}})
    written(run / "models" / "teacher" / "run.json", {"notes": {"result": "4 layers of width 128"}})
    written(run / "samples" / "one" / "run.json", SAMPLED)
    (run / "recipe.toml").write_text('[teacher]\npath = "/somewhere/Llama"\n')
    return path


def test_recipe_data_accuracy_and_speed(student: Path) -> None:
    of_student = {**FIGURES, "kl": 0.5, "train_tokens": 77000}
    models = {"one": of_student, "teacher": {**FIGURES, "majority": 0.5, "kl": 0.0, "train_tokens": 0}}
    written(run_of(student) / "summary.json", {"problems": 20, "models": models})
    card = model_card(student, student, "mine", None, ["beware"])
    for line in (
        "# mine",
        "`thinkfast run r.toml`, thinkfast 0.1.0 (abc).",
        "Its teacher: Llama, 4 layers of width 128.",
        "align: 77,000 tokens in 5 s.",
        "| trained on | 70 documents (seed 1) |",
        "| measured on | 20 problems (seed 2) |",
        "| on 20 problems | one | teacher |",
        "| accuracy of one sample (pass@1) | 0.25 | 0.25 |",
        "| accuracy of the majority vote | 0 | 0.5 |",
        "| tokens per second | 4,321 | 4,321 |",
        "| KL divergence to the teacher, nats a token | 0.5 | – |",
        "| tokens trained on | 77,000 | – |",
        "On 3 cores of A Processor, 16 chains at once in thinkfast's engine (native), 30 seconds for each model, "
        "temperature 0.8, max_tokens 900.",
        "- beware",
    ):
        assert f"\n{line}\n" in card
    settings = json.loads(card.split("```json\n")[1].split("```")[0])
    assert settings == {"stages": ["align"], "align": {"tokens": 77, "lr": 0.5}}, "of stages that ran"


def test_without_measurements_it_says_so(student: Path, make_model: Make) -> None:
    assert "## Measured\n\nKL 0.5 nats a token. Accuracy and speed were not measured.\n" in model_card(
        student, student, "mine", None
    )
    alone = model_card(make_model("llama"), make_model("llama"), "mine", None)
    assert "## Measured\n\nAccuracy and speed were not measured.\n" in alone
    assert "## How" not in alone
    assert "## Data" not in alone


@pytest.mark.parametrize(
    ("source", "run"), [("/r/models/a", "/r"), ("/r/a", "/r"), ("/models/a", "/"), ("/a", "/")], ids=str
)
def test_the_run_around_a_model(source: str, run: str) -> None:
    assert run_of(Path(source)) == Path(run)
