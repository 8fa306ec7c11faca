"""GGUF files: read back with the `gguf` package, and run in llama.cpp itself where it is installed (`make llama`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from thinkfast.errors import BadInput
from thinkfast.export.gguf import export_gguf
from thinkfast.export.vocabulary import RULES
from thinkfast.model.checkpoint import load_model

gguf = pytest.importorskip("gguf")
Make = Callable[..., Path]
NAMES = (
    "llama",
    "llama3",
    "hybrid",
    "hybrid-wide",
    "hybrid-untied-scaled",
    "hybrid-no-positions",
    "groups",
    "groups-wide",
    "pure",
    "pure-groups",
)


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def stored(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_keys_of_a_hybrid(make_model: Make, tmp_path: Path) -> None:
    document = export_gguf(make_model("hybrid"), tmp_path / "new" / "m.gguf", "float32")
    assert "token ids alone" in document["warnings"][0]
    keys = fields(tmp_path / "new" / "m.gguf")
    assert keys["general.architecture"] == "granitehybrid"
    assert keys["granitehybrid.attention.head_count_kv"] == [0, 2, 0]
    assert keys["granitehybrid.rope.scaling.finetuned"] is True
    assert keys["granitehybrid.rope.freq_base"] == 500.0
    assert keys["granitehybrid.attention.scale"] == 0.25
    assert keys["granitehybrid.ssm.inner_size"] == 2 * keys["granitehybrid.embedding_length"] == 128
    assert keys["granitehybrid.ssm.time_step_rank"] == 8
    assert keys["granitehybrid.ssm.group_count"] == 2
    assert keys["tokenizer.ggml.model"] == "no_vocab"
    assert keys["tokenizer.ggml.eos_token_id"] == load_model(make_model("hybrid")).config.eos_token_ids[0]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["m.gguf"]


def test_a_pure_model_gets_the_inert_layer_and_no_positions_the_switch(make_model: Make, tmp_path: Path) -> None:
    export_gguf(make_model("pure"), tmp_path / "p.gguf", "float32")
    assert fields(tmp_path / "p.gguf")["granitehybrid.attention.head_count_kv"] == [0, 0, 2]
    tensors = stored(tmp_path / "p.gguf")
    assert not tensors["blk.2.attn_output.weight"].any()
    assert not tensors["blk.2.ffn_down.weight"].any()
    export_gguf(make_model("hybrid-no-positions"), tmp_path / "n.gguf")
    assert fields(tmp_path / "n.gguf")["granitehybrid.rope.scaling.finetuned"] is False


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_weights_keep_what_their_type_can_hold(make_model: Make, tmp_path: Path, dtype: str) -> None:
    source = make_model("hybrid-wide")
    export_gguf(source, tmp_path / "m.gguf", dtype)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.ssm_in.weight"] == kinds["token_embd.weight"] == kinds["blk.1.attn_q.weight"] == kind
    for name in ("ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_a", "ssm_d", "ssm_dt.bias", "ssm_norm.weight"):
        assert kinds[f"blk.0.{name}"] == "F32"
    state, tensors = load_model(source).state_dict(), stored(tmp_path / "m.gguf")
    rounding = {"float32": 0, "float16": 1e-3, "bfloat16": 1e-2, "q8_0": 2e-2}[dtype]
    for ours, theirs in {
        "embed_tokens.weight": "token_embd.weight",
        "layers.0.mixer.in_proj.weight": "blk.0.ssm_in.weight",
        "layers.0.mixer.out_proj.weight": "blk.0.ssm_out.weight",
        "layers.1.mixer.v_proj.weight": "blk.1.attn_v.weight",
        "layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }.items():
        want = state[ours].numpy()
        assert np.abs(tensors[theirs] - want).max() <= rounding * np.abs(want).max()
    decay = -np.exp(state["layers.0.mixer.A_log"].numpy())
    assert np.allclose(tensors["blk.0.ssm_a"][:, 0], decay, rtol=1e-6, atol=0)


def byte_level(path: Path, pattern: str | None) -> None:
    """A small byte-level BPE tokenizer in the place of a model's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he", "ll", "hell", "Ġhe"])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "he")]
    words = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        level = pre_tokenizers.Sequence([split, level])
    words.pre_tokenizer, words.decoder = level, decoders.ByteLevel()
    words.add_special_tokens(["<|end|>"])
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ messages }}"}))


@pytest.fixture
def spoken(make_model: Make, tmp_path: Path) -> Callable[[str | None], Path]:
    def make(pattern: str | None) -> Path:
        source, target = make_model("hybrid", vocab_size=270, bos_token_id=None, eos_token_ids=(260,)), tmp_path / "m"
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        byte_level(target, pattern)
        return target

    return make


@pytest.mark.parametrize(("pattern", "rule"), [(None, "gpt-2"), *RULES.items()])
def test_known_tokenizers_are_carried_over(spoken, tmp_path: Path, pattern: str | None, rule: str) -> None:
    assert export_gguf(spoken(pattern), tmp_path / "m.gguf")["warnings"] == []
    keys = fields(tmp_path / "m.gguf")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", rule)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 270
    assert keys["tokenizer.ggml.tokens"][260] == "<|end|>"
    assert keys["tokenizer.ggml.token_type"][259:262] == [1, 3, 5]
    assert keys["tokenizer.ggml.merges"] == ["h e", "l l", "he ll", "Ġ he"]
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def complaint(source: Path, out: Path, dtype: str | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        export_gguf(source, out, dtype)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_llama_cpp_cannot_run_is_refused(make_model: Make, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    message = complaint(make_model("hybrid"), out, "int4")
    assert message == "dtype is 'int4', expected one of float32, float16, bfloat16, q8_0 for the format gguf"
    wide = load_model(make_model("pure")).config.mamba
    assert "192 wide, but llama.cpp runs those of 64 (padded) and 128 alone" in complaint(
        make_model("pure", mamba=type(wide)(12, 16, 16, 1)), out
    )
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    assert complaint(make_model("hybrid"), out) == f"{out} exists, expected a new file"
    assert out.read_text() == "mine"


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits at every position, keys and values in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_batch=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.llama
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_llama_cpp_computes_our_logits(make_model: Make, tmp_path: Path, name: str) -> None:
    """Within 2e-3 at float32 weights, and the same greedy tokens, fed one at a time."""
    llama_cpp = pytest.importorskip("llama_cpp")
    source = make_model(name)
    export_gguf(source, tmp_path / "m.gguf", "float32")
    ours = load_model(source)
    ids = torch.randint(ours.config.vocab_size, (40,), generator=torch.Generator().manual_seed(3))
    want = ours(ids[None])[0]
    found = llama_logits(tmp_path / "m.gguf", ids.tolist())
    assert np.abs(found - want.numpy()).max() < 2e-3
    assert (found.argmax(-1) == want.argmax(-1).numpy()).all()

    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    tokens = ids[:9].tolist()
    model.eval(tokens)
    for _ in range(16):
        token = int(np.argmax(model.scores[len(tokens) - 1]))
        assert token == int(ours(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
        model.eval([token])


@pytest.mark.llama
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
@torch.no_grad()
def test_llama_cpp_reads_every_type(make_model: Make, tmp_path: Path, dtype: str) -> None:
    source = make_model("groups-wide")
    export_gguf(source, tmp_path / "m.gguf", dtype)
    ids = list(range(3, 33))
    want = load_model(source)(torch.tensor([ids]))[0].numpy()
    found = llama_logits(tmp_path / "m.gguf", ids)
    assert np.abs(found - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.llama
@pytest.mark.parametrize("pattern", [None, *RULES])
def test_llama_cpp_cuts_texts_into_the_same_tokens(spoken, tmp_path: Path, pattern: str | None) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    source = spoken(pattern)
    export_gguf(source, tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    words = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in ("hello hello\n\n  12345 it's  Hell!?", "Größe: 3.5 €\t→ x<|end|>"):
        assert model.tokenize(text.encode(), add_bos=False, special=True) == words.encode(text).ids
