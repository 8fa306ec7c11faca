"""The bundled teacher is a small stock model that speaks the generator's language and solves most of its problems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thinkfast import runtime
from thinkfast.data import chat, wordproblems
from thinkfast.data.tokenizer import build_word_tokenizer, fingerprint, load_tokenizer
from thinkfast.engine import Engine, SamplingParams
from thinkfast.model.checkpoint import load_model
from thinkfast.scale.grade import extract_answer

TEACHER = runtime.ASSETS / "teacher"


def test_the_teacher_is_small() -> None:
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) < 8e6


def test_the_teacher_has_the_vocabulary_that_the_generator_makes() -> None:
    assert load_tokenizer(TEACHER).fingerprint == fingerprint(build_word_tokenizer())


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_the_measured_accuracy_leaves_something_to_win(kind: str) -> None:
    accuracy = json.loads((TEACHER / "accuracy.json").read_text())[kind]["accuracy"]
    assert 0.35 < accuracy < 0.85
    assert kind == "sampled" or accuracy > 0.55


def test_the_teacher_solves_problems_it_has_not_seen() -> None:
    """Well above chance and in line with accuracy.json: a tokenizer, template or weight that does not fit gives 0."""
    problems = wordproblems.generate(4243, 24, "held-out", [4, 5])
    words = load_tokenizer(TEACHER)
    prompts = [chat.render_prompt(words, problem.problem) for problem in problems]
    drawn = Engine(load_model(TEACHER), slots=24).sample(prompts, 1, SamplingParams(max_tokens=800, temperature=0.0))
    texts = [words.decode(list(sample.token_ids)) for (sample,) in drawn]
    right = [extract_answer(text) == problem.answer for text, problem in zip(texts, problems, strict=True)]
    assert sum(right) > 8


def test_the_log_is_of_the_run_that_made_it() -> None:
    rows = [json.loads(line) for line in Path(TEACHER / "training.jsonl").read_text().splitlines()]
    assert rows == sorted(rows, key=lambda row: row["step"])
    assert rows[-1]["loss"] < rows[0]["loss"] / 20
