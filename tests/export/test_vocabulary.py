"""Tokenizers in GGUF files: small ones of every known kind, published ones, and what llama.cpp makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from thinkfast.errors import BadInput
from thinkfast.export.gguf import export_gguf
from thinkfast.export.vocabulary import RULES, _rule, add_vocabulary
from thinkfast.model.checkpoint import read_config

gguf = pytest.importorskip("gguf", reason="gguf is not installed: the extra dev, with `make test`")
Make = Callable[..., Path]
DATA = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared" / "data").is_dir()), Path("data"))
PUBLISHED = {"qwen2.5": ("Qwen2Tokenizer", "qwen2"), "gpt2": ("GPT2Tokenizer", "gpt-2")}
PATTERNS = {rule: pattern for (pattern, _), rule in RULES.items()}
KINDS = ("gpt-2", "smollm", *PATTERNS)


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def steps(kind: str) -> pre_tokenizers.PreTokenizer:
    """How tokenizers of a kind cut texts, in the words of the `tokenizers` library."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in PATTERNS)
    if kind == "gpt-2":
        return level
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[kind]), behavior="isolated")
    return pre_tokenizers.Sequence([split, level])


def byte_level(kind: str, begin: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer. Its token "hello" cannot be reached by merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he", "ll", "hell", "Ġhe", "hello"])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "he")]
    words = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
    words.pre_tokenizer, words.decoder = steps(kind), decoders.ByteLevel()
    words.add_special_tokens(["<|end|>", "<|begin|>"])
    if begin:
        add = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 262)])
        words.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), add])
    return words


@pytest.fixture
def spoken(make_model: Make, tmp_path: Path) -> Callable[..., Path]:
    """A model with a tokenizer in the place of its own."""

    def make(words: tokenizers.Tokenizer, **more: object) -> Path:
        settings = {"vocab_size": 270, "bos_token_id": 262, "eos_token_ids": (261,), **more}
        source, target = make_model("hybrid", **settings), tmp_path / "m"
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        words.save(str(target / "tokenizer.json"))
        config = {"eos_token": "<|end|>", "chat_template": "{{ messages }}"}
        (target / "tokenizer_config.json").write_text(json.dumps(config))
        return target

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_known_tokenizers_are_carried_over(spoken: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    begin = kind == "llama-bpe"
    assert export_gguf(spoken(byte_level(kind, begin)), tmp_path / "m.gguf")["warnings"] == []
    keys = fields(tmp_path / "m.gguf")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", kind)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 270
    assert keys["tokenizer.ggml.tokens"][261] == "<|end|>"
    assert keys["tokenizer.ggml.token_type"][260:264] == [1, 3, 3, 5]
    assert keys["tokenizer.ggml.merges"] == ["h e", "l l", "he ll", "Ġ he"]
    assert keys["tokenizer.ggml.add_bos_token"] is begin
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def other(change: str) -> tokenizers.Tokenizer:
    words = byte_level("gpt-2")
    if change == "prefix space":
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "another expression":
        split = pre_tokenizers.Split(tokenizers.Regex(r"\\p{L}+"), behavior="isolated")
        words.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif change == "whole words":
        words.model.ignore_merges = True
    elif change == "lower case":
        words.normalizer = tokenizers.normalizers.Lowercase()
    else:
        template = {"single": "$A <|end|>", "special_tokens": [("<|end|>", 261)]}
        words.post_processor = processors.TemplateProcessing(**template)
    return words


@pytest.mark.parametrize("change", ["prefix space", "another expression", "whole words", "lower case", "end of text"])
def test_a_tokenizer_that_llama_cpp_has_not_got_is_left_out(
    spoken: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    warnings = export_gguf(spoken(other(change)), tmp_path / "m.gguf")["warnings"]
    assert warnings == ["llama.cpp has no tokenizer like that of m: the file takes and gives token ids alone"]
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.model"] == "no_vocab"


def test_more_tokens_than_the_model_has_are_refused(spoken: Callable[..., Path], tmp_path: Path) -> None:
    source = spoken(byte_level("gpt-2"), vocab_size=262, bos_token_id=None)
    with pytest.raises(BadInput) as caught:
        export_gguf(source, tmp_path / "m.gguf")
    expected = f"{source}/tokenizer.json: a token has the id 262, expected less than vocab_size 262"
    assert str(caught.value) == expected
    assert not list(tmp_path.glob("*.gguf*"))
    assert not list(tmp_path.glob(".*"))


def published(name: str) -> tokenizers.Tokenizer:
    """The tokenizer of published files, as `transformers` makes it of them."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: the extra dev, with `make test`"
    )
    files = {"vocab": DATA / "tokenizers" / name / "vocab.json", "merges": DATA / "tokenizers" / name / "merges.txt"}
    for file in files.values():
        if not file.is_file():
            pytest.skip(f"{file} is missing: runs where shared/data stands beside the checkout")
    made = getattr(transformers, PUBLISHED[name][0])(**{key: str(file) for key, file in files.items()})
    return tokenizers.Tokenizer.from_str(made._tokenizer.to_str())


def vectors(rule: str) -> list[tuple[str, list[int]]]:
    """Texts and their tokens, as llama.cpp keeps them for its own tests."""
    texts, ids = (DATA / "tokenizers" / "vectors" / f"{rule}.gguf.{end}" for end in ("inp", "out"))
    for file in (texts, ids):
        if not file.is_file():
            pytest.skip(f"{file} is missing: runs where shared/data stands beside the checkout")
    cut = texts.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = [[int(word) for word in line.split()] for line in ids.read_text().split("\n")]
    return list(zip(cut, rows, strict=True))


def vocabulary_file(words: tokenizers.Tokenizer, source: Path, out: Path) -> list[str]:
    """A GGUF file with a tokenizer and no model."""
    (out.parent / "words").mkdir()
    words.save(str(out.parent / "words" / "tokenizer.json"))
    config = replace(read_config(source), vocab_size=words.get_vocab_size(), bos_token_id=None, eos_token_ids=())
    writer = gguf.GGUFWriter(out, "llama")
    warnings = add_vocabulary(writer, out.parent / "words", config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return warnings


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers_are_known(name: str) -> None:
    words, rule = published(name), PUBLISHED[name][1]
    for text, ids in vectors(rule):
        assert words.encode(text, add_special_tokens=False).ids == ids, text
    assert _rule(json.loads(words.to_str())) == rule


def in_llama(path: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make llama`")
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.llama
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_cuts_texts_into_the_same_tokens(spoken: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    words = byte_level(kind, begin=kind in ("llama-bpe", "smollm"))
    export_gguf(spoken(words), tmp_path / "m.gguf")
    model = in_llama(tmp_path / "m.gguf")
    for text in ("hello hello\n\n  12345 it's  Hell!?", "Größe: 3.5 €\t→ x<|end|>"):
        for special in (False, True):
            want = words.encode(text, add_special_tokens=special).ids
            assert model.tokenize(text.encode(), add_bos=special, special=True) == want


@pytest.mark.llama
@pytest.mark.parametrize(("name", "kind"), [("gpt2", None), *(("qwen2.5", kind) for kind in (None, *KINDS))])
def test_llama_cpp_cuts_its_own_texts_alike(make_model: Make, tmp_path: Path, name: str, kind: str | None) -> None:
    """Published tokens and merges, also under the rules of the other kinds; the texts are odd on purpose."""
    words = published(name)
    texts = vectors(PUBLISHED[name][1])
    if kind is not None:
        words.pre_tokenizer, words.model.ignore_merges = steps(kind), kind == "llama-bpe"
        texts = [(text, words.encode(text, add_special_tokens=False).ids) for text, _ in texts]
    assert vocabulary_file(words, make_model("hybrid"), tmp_path / "v.gguf") == []
    model = in_llama(tmp_path / "v.gguf")
    for text, ids in texts:
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ids, text
