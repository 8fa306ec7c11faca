"""The bundled vocabulary loses nothing, and `transformers` reads the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thinkfast.data import chat, tokenizer, wordproblems
from thinkfast.errors import BadInput


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words")
    tokenizer.save_word_tokenizer(path)
    return path


def texts() -> list[str]:
    problems = wordproblems.generate(9, 100, "held-out", list(wordproblems.LEVELS))
    return [f"{problem.problem}\n{problem.solution}" for problem in problems]


def test_encoding_is_lossless_and_knows_every_word(directory: Path) -> None:
    words = tokenizer.load_tokenizer(directory)
    unknown = words.encode("<unk>")[0]
    for text in texts():
        ids = words.encode(text)
        assert unknown not in ids
        assert words.decode(ids) == text


def test_digits_are_single_tokens(directory: Path) -> None:
    words = tokenizer.load_tokenizer(directory)
    assert len(words.encode("Ava has 407 eggs.")) == 2 + 3 + 2
    assert words.encode("407")[1:] == words.encode("107")[1:]


def test_transformers_reads_the_same_tokenizer(directory: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: the extra dev, with `make test`"
    )
    stock = transformers.AutoTokenizer.from_pretrained(directory)
    words = tokenizer.load_tokenizer(directory)
    for text in texts()[:20]:
        assert stock.encode(text, add_special_tokens=False) == words.encode(text)
        assert stock.decode(words.encode(text)) == text
    prompt = stock.apply_chat_template(
        [{"role": "user", "content": "Ava has 5 eggs."}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == chat.render_prompt(words, "Ava has 5 eggs.")
    assert stock.eos_token_id == words.eos_id
    assert stock.pad_token_id == words.pad_id


def test_prompt_without_template_is_plain_text(directory: Path) -> None:
    words = tokenizer.load_tokenizer(directory)
    assert words.decode(chat.render_prompt(words, "Ava has 5 eggs.")) == "Ava has 5 eggs.\n"


def test_fingerprint_tells_vocabularies_apart(directory: Path, tmp_path: Path) -> None:
    words = tokenizer.load_tokenizer(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    assert tokenizer.load_tokenizer(tmp_path).fingerprint == words.fingerprint
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra"] = len(content["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.load_tokenizer(tmp_path).fingerprint != words.fingerprint


def test_broken_directories_name_the_file(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.json: no tokenizer there"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match=r"tokenizer\.json: not a tokenizer"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: missing"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(BadInput, match="eos_token '<end>'"):
        tokenizer.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(BadInput, match="not valid JSON"):
        tokenizer.load_tokenizer(tmp_path)
