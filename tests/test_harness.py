"""thinkfast in the evaluation harness: the same scores as its own Hugging Face model on the export (`make harness`)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thinkfast import runtime
from thinkfast.data.wordproblems import generate
from thinkfast.errors import BadInput
from thinkfast.export.hf import export_hf
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.config import ATTENTION, MAMBA, MambaConfig
from thinkfast.model.decoder import Decoder

pytestmark = [
    pytest.mark.harness,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: `make harness`"),
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
"""
CHOICE = """
task: made_choice
output_type: multiple_choice
doc_to_text: "{{problem}}\\nThe answer is"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
task: made_answer
output_type: generate_until
doc_to_text: "{{problem}}\\n"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: [".", " he"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""
TEXT = """
task: made_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{problem}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
SOLVED = """
task: made_solved
output_type: generate_until
doc_to_text: "{{problem}}\\n"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 600}
filter_list: [{name: stated, filter: [{function: regex, regex_pattern: "#### (-?[0-9]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""
TASKS = ["made_choice", "made_answer", "made_text"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks with 24 word problems of ours."""
    root = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, problem in enumerate(generate(0, 24, "held-out", [2])):
        choices = [f" {problem.answer}", f" {int(problem.answer) + 1}", " 2 apples"]
        rows.append({"problem": problem.problem, "choices": choices[number % 3 :] + choices[: number % 3], "label": 0})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choice": CHOICE, "answer": ANSWER, "text": TEXT}.items():
        (root / f"{name}.yaml").write_text(COMMON.format(data=root / "data.jsonl") + text)
    return root


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random hybrid with the vocabulary of the problems."""
    config = load_model(tiny_teacher).config
    kinds = (MAMBA, ATTENTION)
    torch.manual_seed(6)
    model = Decoder(replace(config, layer_types=kinds, mamba=MambaConfig(4, 8, 8, 2, chunk_size=16)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    path = tmp_path_factory.mktemp("student") / "model"
    save_model(model, path, tokenizer_from=tiny_teacher)
    return path


def evaluate(tasks: Path, model: str, arguments: dict, batch: int, names: list[str] = TASKS) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        batch_size=batch,
        device="cpu",
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )


def test_same_scores_as_the_hugging_face_model(
    student: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import thinkfast.harness  # noqa: F401 - registers the model

    export_hf(student, tmp_path / "export")
    ours = evaluate(tasks, "thinkfast", {"path": str(student)}, 7)
    theirs = evaluate(tasks, "hf", {"pretrained": str(tmp_path / "export"), "dtype": "float32"}, 4)
    for task in TASKS:
        found, wanted = ours["results"][task], theirs["results"][task]
        numbers = [key for key, value in wanted.items() if isinstance(value, float)]
        assert numbers
        for key in numbers:
            assert found[key] == pytest.approx(wanted[key], rel=1e-4), (task, key)
    answers = [
        [row["resps"][0][0] for row in sorted(document["samples"]["made_answer"], key=lambda row: row["doc_id"])]
        for document in (ours, theirs)
    ]
    assert answers[0] == answers[1]
    assert len({*answers[0]}) > 3
    for mine, other in zip(ours["samples"]["made_choice"], theirs["samples"]["made_choice"], strict=True):
        for (score, greedy), (their_score, their_greedy) in zip(
            mine["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(score) == pytest.approx(float(their_score), abs=1e-3)
            assert str(greedy) == str(their_greedy)


def test_the_bundled_teacher_solves_as_many_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model that reaches answers: the score is that of the Hugging Face model, and not zero."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import thinkfast.harness  # noqa: F401 - registers the model

    rows = [{"problem": p.problem, "answer": p.answer} for p in generate(0, 6, "held-out", [3])]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "solved.yaml").write_text(COMMON.format(data=tmp_path / "data.jsonl") + SOLVED)
    teacher = runtime.ASSETS / "teacher"
    export_hf(teacher, tmp_path / "export")
    ours = evaluate(tmp_path, "thinkfast", {"path": str(teacher)}, 4, ["made_solved"])
    theirs = evaluate(tmp_path, "hf", {"pretrained": str(tmp_path / "export"), "dtype": "float32"}, 6, ["made_solved"])
    found, wanted = (document["results"]["made_solved"]["exact_match,stated"] for document in (ours, theirs))
    assert found == wanted > 0
    texts = [[row["resps"][0][0] for row in document["samples"]["made_solved"]] for document in (ours, theirs)]
    assert texts[0] == texts[1]


def run(program: list[str], student: Path, tasks: Path, out: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["--model", "thinkfast", "--model_args", f"path={student}", "--tasks", "made_choice", "--limit", "3"]
    arguments += ["--include_path", str(tasks), "--batch_size", "2", "--output_path", str(out)]
    return subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)


def test_the_harness_finds_the_plug_in(student: Path, tasks: Path, tmp_path: Path) -> None:
    """Its own program, in an environment in which thinkfast is installed and nothing else is done."""
    program = Path(sys.executable).with_name("lm_eval")
    assert program.is_file(), "lm_eval is installed without its program"
    done = run([str(program)], student, tasks, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "thinkfast" in done.stdout
    assert "made_choice" in done.stdout
    assert list(tmp_path.glob("out*.json"))


def test_the_command_line(student: Path, tasks: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "thinkfast.harness"]
    done = run(program, student, tasks, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "made_choice" in done.stdout
    done = run(program, tmp_path / "nothing", tasks, tmp_path / "out.json")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"thinkfast: {tmp_path}/nothing/tokenizer.json: no tokenizer there"


def test_sampling_repeats_differ_and_mistakes_are_named(student: Path) -> None:
    from thinkfast.harness import ThinkfastLM

    model = ThinkfastLM(str(student), batch_size=4)
    drawn = model._generate(["Ann has 3 apples."] * 6, {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})
    assert len(set(drawn)) > 1
    for settings, expected in {
        "num_beams": ({"num_beams": 4, "until": []}, "num_beams is not known"),
        "max_gen_toks": ({"max_gen_toks": 512, "until": []}, "max_gen_toks is 512, expected less than 512"),
    }.values():
        with pytest.raises(BadInput, match=expected):
            model._generate(["Ann"], settings)
    with pytest.raises(BadInput, match="batch_size is 'auto'"):
        ThinkfastLM(str(student), batch_size="auto")
    with pytest.raises(BadInput, match="dtype is 'int8'"):
        ThinkfastLM(str(student), dtype="int8")
