"""Mixtures of files and data sets: shares, order, conversations, and complaints that name the row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from thinkfast.data.corpus import Corpus, write_corpus
from thinkfast.data.sources import Source, check_sources, conversation, documents, mixed
from thinkfast.data.tokenizer import CHAT_TEMPLATE, Tokenizer, load_tokenizer, save_word_tokenizer
from thinkfast.errors import BadInput


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("words")
    save_word_tokenizer(directory)
    return load_tokenizer(directory)


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path: Path, word: str, count: int) -> str:
    return jsonl(path, [{"text": f"{word} has {index}"} for index in range(count)])


def take(sources, words, tokens=None):
    counts: list = []
    return list(mixed(sources, words, tokens, counts)), counts


def test_every_kind_of_row_and_file_becomes_a_document(tmp_path, words):
    chat = [{"role": "user", "content": "Dan has 3"}, {"role": "assistant", "content": "Dan 3"}]
    rows = [{"problem": "Dan has 3", "solution": "Dan 3"}, {"messages": chat}, {"text": "Dan has 3"}]
    found = list(documents(Source(jsonl(tmp_path / "a.jsonl", rows)), words))
    end = [words.eos_id]
    assert found[0] == (words.encode("<bos>Dan has 3\n"), words.encode("Dan 3") + end)
    assert found[1] == [words.encode("<bos>Dan has 3\n"), words.encode("Dan 3<eos>")]
    assert found[2] == ([], words.encode("Dan has 3") + end)

    pyarrow.parquet.write_table(pyarrow.table({"content": ["Dan has 3", "Ben has 4"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("Dan has 3\nBen has 4\n\n\nCora has 5\n")
    parquet = list(documents(Source(str(tmp_path / "b.parquet"), text="content"), words))
    assert [words.decode(ids) for _, ids in parquet] == ["Dan has 3", "Ben has 4"]
    plain = list(documents(Source(str(tmp_path / "c.txt")), words))
    assert [words.decode(ids) for _, ids in plain] == ["Dan has 3\nBen has 4", "Cora has 5"]


def test_a_pattern_reads_its_files_in_order(tmp_path, words):
    for name, word in (("b", "Ben"), ("a", "Dan"), ("c", "Cora")):
        texts(tmp_path / f"{name}.jsonl", word, 1)
    found = [words.decode(ids) for _, ids in documents(Source(str(tmp_path / "*.jsonl")), words)]
    assert found == ["Dan has 0", "Ben has 0", "Cora has 0"]


def test_shares_hold_at_every_moment_and_an_ended_source_begins_again(tmp_path, words):
    sources = [Source(texts(tmp_path / "a.jsonl", "Dan", 9), 3.0), Source(texts(tmp_path / "b.jsonl", "Ben", 4), 1.0)]
    found, counts = take(sources, words, tokens=400)
    seen, ann = 0, 0
    for document in found:
        size = sum(map(len, document))
        seen, ann = seen + size, ann + size * ("Dan" in words.decode(document[1]))
        assert abs(ann - 0.75 * seen) <= 4
    assert 400 <= seen < 404
    assert [count["passes"] for count in counts] == [9, 7]
    assert sum(count["tokens"] for count in counts) == seen
    assert take(sources, words, tokens=400)[0] == found


def test_without_a_number_of_tokens_everything_is_read_once(tmp_path, words):
    sources = [Source(texts(tmp_path / "a.jsonl", "Dan", 5)), Source(texts(tmp_path / "b.jsonl", "Ben", 2))]
    found, counts = take(sources, words)
    assert len(found) == 7
    assert [(count["documents"], count["passes"]) for count in counts] == [(5, 1), (2, 1)]


def test_every_answer_of_a_conversation_is_learnt_and_nothing_else(tmp_path, words):
    turns = [
        ("user", "Dan has 3"),
        ("assistant", "Dan 3"),
        ("user", "Ben has 4"),
        ("assistant", "Ben 4"),
        ("user", "1"),
    ]
    stretches = conversation([{"role": role, "content": text} for role, text in turns], words, "here")
    assert [words.decode(part) for part in stretches] == ["Dan has 3\n", "Dan 3", "Ben has 4\n", "Ben 4"]
    corpus = write_corpus(tmp_path, [([5], [6]), stretches, ([7], [8, 9])], words.fingerprint, words.vocab_size)
    assert [Corpus(tmp_path).stretches(index) for index in range(3)] == [[[5], [6]], stretches, [[7], [8, 9]]]
    batch = Corpus(tmp_path).collate(np.array([1, 2]))
    marks = [token for part, learnt in zip(stretches, (0, 1, 0, 1), strict=True) for token in [learnt] * len(part)]
    assert batch.completion[0].int().tolist() == marks
    assert batch.completion[1].int().tolist()[:3] == [0, 1, 1]
    part = corpus.slice(1, 3)
    assert part.collate(np.array([0])).completion[0].int().tolist() == marks
    assert part.stream(np.array([1, 0]), range(1), 3 + len(marks)).completion[0].int().tolist() == [0, 1, 1, *marks]
    assert corpus.identity != write_corpus(tmp_path / "2", [([5], [6])], words.fingerprint, words.vocab_size).identity


def test_a_template_that_rewrites_earlier_turns_is_refused(words):
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    changing = replace(words, chat_template=template)
    turns = [{"role": "user", "content": "Dan"}, {"role": "assistant", "content": "Ben"}]
    with pytest.raises(BadInput, match="here: messages: the chat template changes earlier turns"):
        conversation(turns, changing, "here")
    assert conversation(turns, replace(words, chat_template=None), "here")[1][-1] == words.eos_id
    assert words.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"text": "Dan"}, {"words": "Dan"}], r"a.jsonl: row 2: expected messages, problem and solution, or text"),
        ([{"text": ""}], r"a.jsonl: row 1: text: expected text, got ''"),
        ([{"problem": "Dan"}], r"a.jsonl: row 1: solution: expected text, got None"),
        (["Dan"], r"a.jsonl: row 1: expected an object, got str"),
        ([{"messages": [{"role": "user"}]}], r"a.jsonl: row 1: messages: expected a list"),
        ([{"messages": [{"role": "user", "content": "Dan"}]}], r"a.jsonl: row 1: messages: no turn of an assistant"),
        ([], r"a.jsonl: no rows in it"),
    ],
)
def test_unusable_rows_are_named(tmp_path, words, rows, complaint):
    with pytest.raises(BadInput, match=complaint) as caught:
        take([Source(jsonl(tmp_path / "a.jsonl", rows))], words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "tokens", "complaint"),
    [
        ([Source("nowhere/*.jsonl")], None, r"nowhere/\*.jsonl: no such file"),
        ([Source("pyproject.toml")], None, "pyproject.toml: expected a file that ends in one of"),
        ([Source("hf:a/b", 1.0), Source("hf:c/d", 2.0)], None, "weights that differ need corpus.tokens"),
    ],
)
def test_sources_are_checked_before_work_begins(sources, tokens, complaint):
    with pytest.raises(BadInput, match=complaint):
        check_sources(sources, tokens)


def test_a_data_set_of_the_hub_is_read_row_by_row(tmp_path, words):
    pytest.importorskip("datasets", reason="datasets is not installed: the extra dev, with `make test`")
    (tmp_path / "set").mkdir()
    texts(tmp_path / "set" / "train.jsonl", "Dan", 3)
    found = [words.decode(ids) for _, ids in documents(Source(f"hf:{tmp_path / 'set'}"), words)]
    assert found == ["Dan has 0", "Dan has 1", "Dan has 2"]
    rest = [words.decode(ids) for _, ids in documents(Source(f"hf:{tmp_path / 'set'}"), words, 2)]
    assert rest == found[2:]
    with pytest.raises(BadInput, match=r"cannot be loaded"):
        list(documents(Source(f"hf:{tmp_path / 'set'}", split="nowhere"), words))
