"""The tokenizer of a model directory in the terms of GGUF, where llama.cpp has the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfast.errors import BadInput
from thinkfast.model.config import DecoderConfig
from thinkfast.records import read_json

if TYPE_CHECKING:
    import gguf

# What llama.cpp calls the rules by which byte-level BPE cuts a text into words, by their regular expression and by
# whether a word that is a token is taken whole, without looking at the merges.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    (_WORDS % r"\p{N}{1,3}", True): "llama-bpe",
    (_WORDS % r"\p{N}{1,3}", False): "dbrx",
    (_WORDS % r"\p{N}", False): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def add_vocabulary(writer: gguf.GGUFWriter, source: Path, config: DecoderConfig) -> list[str]:
    """Writes tokens, merges, special ids and the chat template; returns warnings.

    A tokenizer that llama.cpp has not got is left out: the file then takes and gives token ids. Raises BadInput for one
    with more tokens than the model.
    """
    for name, value in (("bos", config.bos_token_id), ("pad", config.pad_token_id)):
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    file = source / "tokenizer.json"
    document = read_json(file) if file.is_file() else {}
    rule, begins = _rule(document), _begins(document, config)
    if rule is None or begins is None:
        writer.add_tokenizer_model("no_vocab")
        return [f"llama.cpp has no tokenizer like that of {source.name}: the file takes and gives token ids alone"]
    vocabulary: dict[str, int] = document["model"]["vocab"]
    highest = max([*vocabulary.values(), *(added["id"] for added in document.get("added_tokens", []))])
    if highest >= config.vocab_size:
        raise BadInput(f"{file}: a token has the id {highest}, expected less than vocab_size {config.vocab_size}")
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
    writer.add_add_bos_token(begins)
    template = _chat_template(source)
    if template is not None:
        writer.add_chat_template(template)
    return []


def _rule(document: dict[str, Any]) -> str | None:
    """llama.cpp's name of the rules of a byte-level BPE tokenizer, None for any other tokenizer."""
    model, before = document.get("model", {}), document.get("pre_tokenizer") or {}
    # llama.cpp leaves texts as they are: what NFC would change, which few texts have, it cuts otherwise.
    normal = document.get("normalizer") in (None, {"type": "NFC"})
    odd = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model.get("type") != "BPE" or not normal or any(model.get(name) for name in odd):
        return None
    whole = bool(model.get("ignore_merges"))
    steps = before.get("pretokenizers", [before])
    kinds, last = [step.get("type") for step in steps], steps[-1]
    if last.get("add_prefix_space"):
        return None
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and not steps[0].get("invert"):
        found = RULES.get((steps[0].get("pattern", {}).get("Regex"), whole))
        return found if steps[0].get("behavior") == "Isolated" else None
    if whole or not last.get("use_regex", True):
        return None
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    return "gpt-2" if kinds == ["ByteLevel"] else None


def _begins(document: dict[str, Any], config: DecoderConfig) -> bool | None:
    """Whether the tokenizer puts the model's first token before every text, None where it adds anything else."""
    after = document.get("post_processor") or {}
    templates = [step for step in after.get("processors", [after]) if step.get("type") not in (None, "ByteLevel")]
    if not templates:
        return False
    if len(templates) > 1 or templates[0]["type"] != "TemplateProcessing":
        return None
    parts = [next(iter(part.items())) for part in templates[0]["single"]]
    if [kind for kind, _ in parts] == ["Sequence"]:
        return False
    if [kind for kind, _ in parts] != ["SpecialToken", "Sequence"]:
        return None
    ids = templates[0]["special_tokens"][parts[0][1]["id"]]["ids"]
    return True if ids == [config.bos_token_id] else None


def _chat_template(source: Path) -> str | None:
    if (source / "chat_template.jinja").is_file():
        return (source / "chat_template.jinja").read_text()
    file = source / "tokenizer_config.json"
    template = json.loads(file.read_text()).get("chat_template") if file.is_file() else None
    return template if isinstance(template, str) else None
