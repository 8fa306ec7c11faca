"""Tokenizers: the stock one of a model directory, and the small closed vocabulary of the bundled teacher."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from thinkfast.data import wordproblems
from thinkfast.errors import BadInput

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
PIECE = r" ?[0-9]| ?[A-Za-z]+|\n| ?#+| ?[^\sA-Za-z0-9#]|\s"
"""A digit, word, line end, run of # or sign, each with the space before it: joined again they are the text."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to ids and back, with what the model directory says about special tokens and chat."""

    backend: tokenizers.Tokenizer
    eos_id: int
    pad_id: int
    bos_token: str
    eos_token: str
    chat_template: str | None
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens written in it become their ids, none are added."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens."""
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text


def load_tokenizer(model_dir: Path | str) -> Tokenizer:
    """The tokenizer of a stock model directory (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`).

    Raises BadInput naming the file when one is missing or broken, or names no end-of-sequence token.
    """
    directory = Path(model_dir)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{path}: no tokenizer there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of broken file
        raise BadInput(f"{path}: not a tokenizer: {str(error).splitlines()[0]}") from error
    settings = _settings(directory / "tokenizer_config.json")
    eos_token = _token(settings.get("eos_token"))
    eos_id = backend.token_to_id(eos_token) if eos_token else None
    if eos_token is None or eos_id is None:
        raise BadInput(f"{directory / 'tokenizer_config.json'}: eos_token {eos_token!r} is not in the vocabulary")
    pad_token = _token(settings.get("pad_token"))
    pad_id = backend.token_to_id(pad_token) if pad_token else None
    template = settings.get("chat_template")
    template_path = directory / "chat_template.jinja"
    if template_path.is_file():
        template = template_path.read_text()
    return Tokenizer(
        backend,
        eos_id,
        eos_id if pad_id is None else pad_id,
        _token(settings.get("bos_token")) or "",
        eos_token,
        template if isinstance(template, str) else None,
        fingerprint(backend),
    )


def fingerprint(backend: tokenizers.Tokenizer) -> str:
    """A hash of the vocabulary: equal for two tokenizers that give every token the same id."""
    vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def build_word_tokenizer() -> tokenizers.Tokenizer:
    """The closed vocabulary of the word problems: every digit, word and sign a token of its own."""
    splitter = pre_tokenizers.Split(tokenizers.Regex(PIECE), behavior="isolated")
    pieces: set[str] = set()
    for problem in wordproblems.generate(0, 2000, "train", list(wordproblems.LEVELS)):
        text = f"{problem.problem}\n{problem.solution}"
        pieces.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    pieces.update(lead + name for name in wordproblems.NAMES for lead in ("", " "))
    pieces.update(f" {item}" for item in wordproblems.ITEMS)
    pieces.update(lead + digit for digit in "0123456789" for lead in ("", " "))
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *sorted(pieces)])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, BOS, EOS, UNKNOWN])
    return backend


def save_word_tokenizer(directory: Path) -> None:
    """Writes the bundled teacher's tokenizer as stock files that `transformers` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    build_word_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path}: missing")
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: not valid JSON at line {error.lineno}") from error
    if not isinstance(settings, dict):
        raise BadInput(f"{path}: expected an object")
    return settings


def _token(value: object) -> str | None:
    """A special token, written as text or as {"content": text}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
