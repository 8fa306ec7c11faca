"""What cannot be distilled is refused by the command in one line, before any work: nothing is tokenised or trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from thinkfast.cli import main
from thinkfast.data.corpus import write_corpus
from thinkfast.data.tokenizer import load_tokenizer

ROW = {"id": "a", "problem": "Dan has 3", "answer": "3", "solution": "Dan 3"}


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(capsys, words: list[object], out: Path) -> str:
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert not (out / "student").exists()
    return captured.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "train.jsonl", [{**ROW, "id": str(index)} for index in range(4)])


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ("1,1", "attention layers: 1 is named twice"),
        ("0,2", "attention layers: 2 is out of range, the teacher has layers"),
    ],
)
def test_a_plan_that_names_layers_wrongly(tiny_teacher, data, tmp_path, capsys, layers, complaint):
    out = tmp_path / "out"
    told = refused(capsys, ["distill", tiny_teacher, data, out, "--attention", layers], out)
    assert told.startswith(f"thinkfast: student student: {complaint}")
    assert not (out / "corpus").exists()


def test_a_tokenizer_with_more_tokens_than_the_model(tiny_teacher, data, tmp_path, capsys):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    document = json.loads(path.read_text())
    size = len(document["model"]["vocab"])
    document["model"]["vocab"]["one-more"] = size
    path.write_text(json.dumps(document))
    out = tmp_path / "out"
    told = refused(capsys, ["distill", tmp_path / "teacher", data, out], out)
    assert f"the tokenizer has {size + 1} tokens and the model {size}" in told
    assert not (out / "corpus").exists()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "no problems in it"),
        ([{**ROW, "solution": None}], "problem a has no solution to learn from"),
        ([{**ROW, "solution": " "}], "problem a has no solution to learn from"),
    ],
)
def test_an_empty_data_set_and_one_without_anything_to_learn(tiny_teacher, tmp_path, capsys, rows, complaint):
    out = tmp_path / "out"
    file = jsonl(tmp_path / "rows.jsonl", rows)
    assert complaint in refused(capsys, ["distill", tiny_teacher, file, out], out)


LATE = {
    "distill": ({"distill.row_tokens": 300}, "distill.row_tokens 300: the teacher has 512 positions and"),
    "distill positions": ({"distill.row_tokens": 600}, "distill.row_tokens 600: the teacher has 512 positions"),
    "distill loss": ({"distill.loss": "{forward_kl = 0.0}"}, "loss has no weight above 0"),
    "distill blend": ({"distill.blend": "[0.9, 0.1]"}, "blend is [0.9, 0.1], expected two rising shares"),
    "matrices": ({"student.0.mixer": "'mamba1'"}, "Mamba-1 has no mixer matrix a head: leave the stage 'matrices' out"),
    "matrices kept": ({"student.0.attention": "[0, 1]"}, "matrices: the student replaces no attention layer"),
    "on_policy": ({"on_policy.max_tokens": 510}, "on_policy.max_tokens 510: with the longest prompt that is"),
    "on_policy loss": ({"on_policy.loss": "{jsd = 0.0}"}, "loss has no weight above 0"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_a_late_stage_would_refuse_is_refused_before_the_first(tiny_teacher, data, tmp_path, capsys, case):
    changes, complaint = LATE[case]
    out, stage = tmp_path / "out", case.split()[0]
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'[teacher]\npath = "{tiny_teacher}"\n[corpus]\npath = "{data}"\nheld_out = 1\n[base]\n'
        f'[[student]]\nname = "student"\nstages = ["sft", "{stage}"]\n'
    )
    words = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert complaint in refused(capsys, ["distill", recipe, out, *words], out)
    assert not (out / "base").exists()


def test_documents_longer_than_the_teachers_positions(tiny_teacher, tmp_path, capsys):
    rows = [{**ROW, "id": str(index), "solution": "Dan 3 " * (index * 100 + 1)} for index in range(5)]
    out, file = tmp_path / "out", jsonl(tmp_path / "rows.jsonl", rows)
    told = refused(capsys, ["distill", tiny_teacher, file, out, "--set", "corpus.held_out=1"], out)
    assert "align: 1 documents of" in told
    assert "are longer than the teacher's 512 positions, the longest 60" in told
    assert told.rstrip().endswith("leave them out, or set align.row_tokens")


def test_sources_without_a_row_or_an_answer(tiny_teacher, tmp_path, capsys):
    out = tmp_path / "out"
    asked = [{"messages": [{"role": "user", "content": "Dan has 3"}]}]
    for rows, complaint in (([], "no rows in it"), (asked, "no turn of an assistant")):
        file = jsonl(tmp_path / "rows.jsonl", rows)
        recipe = tmp_path / "mine.toml"
        source = (
            f'[teacher]\npath = "{tiny_teacher}"\n[[corpus.sources]]\npath = "{file}"\n[[student]]\nname = "student"\n'
        )
        recipe.write_text(source)
        assert complaint in refused(capsys, ["distill", recipe, out], out)
        shutil.rmtree(out)


def test_a_corpus_of_another_tokenizer(tiny_teacher, tmp_path, capsys):
    out, words = tmp_path / "out", load_tokenizer(tiny_teacher)
    write_corpus(tmp_path / "other", [([5], [6, 7])] * 9, "0123456789abcdef", words.vocab_size)
    told = refused(capsys, ["distill", tiny_teacher, tmp_path / "other", out], out)
    assert f"tokenizer is 0123456789abcdef, expected {words.fingerprint}; tokenise the data again" in told


def test_a_corpus_of_this_tokenizer_is_read_where_it_lies(tiny_teacher, tmp_path):
    words = load_tokenizer(tiny_teacher)
    write_corpus(tmp_path / "mine", [([5], [6, 7, words.eos_id])] * 9, words.fingerprint, words.vocab_size)
    changes = ["corpus.held_out=2", "align.tokens=20", "distill.tokens=20", "watch.answers=0"]
    options = [part for change in changes for part in ("--set", change)]
    assert main(["distill", str(tiny_teacher), str(tmp_path / "mine"), str(tmp_path / "out"), *options]) == 0
    assert not (tmp_path / "out" / "corpus").exists()


def test_a_missing_pad_token_is_told_and_does_no_harm(tiny_teacher, data, tmp_path, capsys):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    settings = tmp_path / "teacher" / "tokenizer_config.json"
    document = json.loads(settings.read_text())
    del document["pad_token"]
    settings.write_text(json.dumps(document))
    changes = ["corpus.held_out=1", "align.tokens=20", "distill.tokens=20", "watch.answers=0"]
    options = [part for change in changes for part in ("--set", change)]
    rows = []
    for teacher in (tiny_teacher, tmp_path / "teacher"):
        out = tmp_path / f"out-{teacher.name}-{len(rows)}"
        assert main(["distill", str(teacher), str(data), str(out), *options]) == 0
        told = capsys.readouterr().err
        assert ("no pad token" in told) == bool(rows)
        lines = (out / "student" / "metrics.jsonl").read_text().splitlines()
        rows.append([{**json.loads(line), "seconds": 0} for line in lines])
    assert rows[0] == rows[1]


def test_without_data_or_a_recipe_the_command_says_what_it_expects(tiny_teacher, tmp_path, capsys):
    assert "expected TEACHER DATA OUT, or a recipe" in refused(capsys, ["distill", tiny_teacher], tmp_path)
