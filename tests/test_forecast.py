"""Every shipped recipe of a published teacher is planned without a network, and its first steps run on a small random
model of the same architecture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thinkfast import forecast, runtime
from thinkfast.cli import main
from thinkfast.data.tokenizer import load_tokenizer, save_word_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.distill.cost import sizes
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.decoder import Decoder
from thinkfast.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
PUBLISHED = ("smollm2-135m-hybrid", "llama3.2-1b-pure", "llama3.2-1b-hybrid", "llama3.2-3b-pure")
PUBLISHED += ("llama3.2-3b-hybrid", "qwen2.5-1.5b-hybrid")
BILLIONS = {"smollm2-135m": 0.135, "llama3.2-1b": 1.24, "llama3.2-3b": 3.21, "qwen2.5-1.5b": 1.54}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("forecast")
    problems = generate(3, 12, "train", [1])
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer, "solution": p.solution} for p in problems]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_word_tokenizer(root / "words")
    return root


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_planned(name, capsys):
    assert main(["distill", str(FOLDER / f"{name}.toml"), "--plan", "8xH100", "--json"]) == 0
    told, last = capsys.readouterr().out.strip().rsplit("\n", 1)
    plan = json.loads(last)
    (rows,) = plan["models"].values()
    recipe = load_recipe(FOLDER / f"{name}.toml")
    (student,) = recipe.student
    assert [row["stage"] for row in rows] == list(student.stages)
    assert all(0 < row["gib_per_gpu"] < 80 for row in rows)
    assert plan["hours"] == pytest.approx(sum(row["hours"] for row in rows), abs=0.01)
    assert f"8 x H100 for {plan['hours']:.1f} hours, if 30% of their peak is reached" in told
    parameters = sizes(forecast.teacher_shape(recipe.teacher.path)).whole / 1e9
    assert parameters == pytest.approx(BILLIONS[name.rsplit("-", 1)[0]], rel=0.01)
    distill = rows[-1]
    # Three passes and the recomputed one through the student, one through the teacher: two FLOPs a parameter each.
    assert distill["flops"] / distill["tokens"] > 8 * 1e9 * parameters


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_planned(path, capsys):
    assert main(["distill", str(path), "--plan", "8xH100", "--json"]) == 0
    plan, recipe = json.loads(capsys.readouterr().out.strip().rsplit("\n", 1)[-1]), load_recipe(path)
    trained = {student.name: student for student in recipe.student} | ({"base": recipe.base} if recipe.base else {})
    wanted = {name: [s for s in given.stages if getattr(given, s).tokens] for name, given in trained.items()}
    assert {name: [row["stage"] for row in rows] for name, rows in plan["models"].items()} == wanted


def test_too_little_memory_is_refused_before_anything_is_done(capsys):
    assert main(["distill", str(FOLDER / "llama3.2-3b-hybrid.toml"), "--plan", "RTX4090"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "GiB on every RTX4090, which has 24.0" in error


def test_too_little_memory_of_this_machine_is_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "memory_bytes", lambda: 1 << 20)
    assert main(["distill", "bundled", str(data / "train.jsonl"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "align.batch_tokens 3072: needs" in error
    assert "GiB on this machine, which has 0.0" in error
    assert not (tmp_path / "out" / "corpus").exists()


def test_a_plan_of_a_teacher_on_disk(data, capsys):
    words = ["distill", "bundled", str(data / "train.jsonl"), "unused", "--attention", "2", "--plan", "RTX3090"]
    assert main(words) == 0
    assert "1 x RTX3090" in capsys.readouterr().out
    assert not Path("unused").exists()


def test_an_unknown_teacher_names_those_that_are_known():
    with pytest.raises(BadInput, match=r"no such model directory; shapes are known by name of .*Llama-3.2-1B-Instruct"):
        forecast.teacher_shape("meta-llama/Llama-9")


@pytest.mark.parametrize("name", PUBLISHED)
def test_first_steps_run_on_a_shrunken_model_of_the_same_architecture(name, data, tmp_path):
    recipe = load_recipe(FOLDER / f"{name}.toml")
    words = load_tokenizer(data / "words")
    shape = forecast.teacher_shape(recipe.teacher.path)
    ratio = shape.num_heads // shape.num_kv_heads
    torch.manual_seed(0)
    small = replace(
        shape,
        vocab_size=words.vocab_size,
        hidden_size=8 * ratio,
        intermediate_size=24,
        num_heads=ratio,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_ids=(words.eos_id,),
        pad_token_id=words.pad_id,
    )
    save_model(Decoder(small), tmp_path / "teacher", tokenizer_from=data / "words")
    changes = {
        "teacher.path": tmp_path / "teacher",
        "corpus.sources": f'[{{path = "{data / "train.jsonl"}"}}]',
        "corpus.tokens": 1500,
        "corpus.held_out": 2,
        "compute.dtype": "float32",
        "watch.answers": 0,
    }
    for stage in recipe.student[0].stages:
        changes |= {f"{stage}.tokens": 150, f"{stage}.batch_tokens": 64, f"{stage}.row_tokens": 32}
        changes |= {f"{stage}.accumulate": 2}
    arguments = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert main(["distill", str(FOLDER / f"{name}.toml"), str(tmp_path / "out"), *arguments]) == 0
    (student,) = recipe.student
    made = load_model(tmp_path / "out" / "models" / student.name)
    kept = tuple(index for index, kind in enumerate(made.config.layer_types) if kind == "attention")
    assert kept == student.attention
    assert made.config.qkv_bias == (shape.qkv_bias and bool(kept))
    rows = (tmp_path / "out" / "models" / student.name / "metrics.jsonl").read_text().splitlines()
    assert list(dict.fromkeys(json.loads(row)["stage"] for row in rows)) == list(student.stages)
