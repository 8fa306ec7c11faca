"""The tokenizer of a model directory in the terms of GGUF, where llama.cpp has the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast.model.config import DecoderConfig
from thinkfast.records import read_json

if TYPE_CHECKING:
    import gguf

# What llama.cpp calls the rules by which byte-level BPE cuts a text into words, by their regular expression.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def add_vocabulary(writer: gguf.GGUFWriter, source: Path, config: DecoderConfig) -> list[str]:
    """Writes tokens, merges, special ids and the chat template; returns warnings.

    A tokenizer that llama.cpp has not got is left out: the file then takes and gives token ids.
    """
    for name, value in (("bos", config.bos_token_id), ("pad", config.pad_token_id)):
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    file = source / "tokenizer.json"
    document = read_json(file) if file.is_file() else {}
    rule = _rule(document)
    if rule is None:
        writer.add_tokenizer_model("no_vocab")
        return [f"llama.cpp has no tokenizer like that of {source.name}: the file takes and gives token ids alone"]
    vocabulary: dict[str, int] = document["model"]["vocab"]
    tokens, types = [f"[PAD{index}]" for index in range(config.vocab_size)], [UNUSED] * config.vocab_size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    for added in document.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = document["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    # The chat template writes the first token itself.
    writer.add_add_bos_token(False)
    template = _chat_template(source)
    if template is not None:
        writer.add_chat_template(template)
    return []


def _rule(document: dict[str, Any]) -> str | None:
    """llama.cpp's name of the rules of a byte-level BPE tokenizer, None for any other tokenizer."""
    model, before = document.get("model", {}), document.get("pre_tokenizer") or {}
    normal = document.get("normalizer") in (None, {"type": "NFC"})
    if model.get("type") != "BPE" or model.get("byte_fallback") or not normal:
        return None
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return RULES.get(steps[0].get("pattern", {}).get("Regex"))
    return None


def _chat_template(source: Path) -> str | None:
    if (source / "chat_template.jinja").is_file():
        return (source / "chat_template.jinja").read_text()
    file = source / "tokenizer_config.json"
    template = json.loads(file.read_text()).get("chat_template") if file.is_file() else None
    return template if isinstance(template, str) else None
