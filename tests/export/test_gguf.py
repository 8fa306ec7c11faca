"""GGUF files: read back with the `gguf` package, and run in llama.cpp itself where it is installed (`make llama`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from thinkfast import runtime
from thinkfast.data.chat import render_prompt
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.engine import Engine, SamplingParams
from thinkfast.errors import BadInput
from thinkfast.export.gguf import export_gguf
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan

gguf = pytest.importorskip("gguf", reason="gguf is not installed: the extra dev, with `make test`")
Make = Callable[..., Path]
NAMES = (
    "llama",
    "llama3",
    "qwen2",
    "hybrid",
    "hybrid-bias",
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
    assert "queries and keys are normed" in complaint(make_model("qwen3"), out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    assert complaint(make_model("hybrid"), out) == f"{out} exists, expected a new file"
    assert out.read_text() == "mine"


def in_llama(path: Path, context: int = 128):
    """The file in llama.cpp, which keeps logits of every position; keys and values in float32, as ours."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make llama`")
    return llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )


def llama_logits(path: Path, ids: list[int], context: int = 128) -> np.ndarray:
    model = in_llama(path, context)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.llama
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_llama_cpp_computes_our_logits(make_model: Make, tmp_path: Path, name: str) -> None:
    """Within 2e-3 at float32 weights, and the same greedy tokens, fed one at a time."""
    source = make_model(name)
    export_gguf(source, tmp_path / "m.gguf", "float32")
    ours = load_model(source)
    ids = torch.randint(ours.config.vocab_size, (40,), generator=torch.Generator().manual_seed(3))
    want = ours(ids[None])[0]
    found = llama_logits(tmp_path / "m.gguf", ids.tolist())
    assert np.abs(found - want.numpy()).max() < 2e-3
    assert (found.argmax(-1) == want.argmax(-1).numpy()).all()

    model = in_llama(tmp_path / "m.gguf")
    tokens = ids[:9].tolist()
    model.eval(tokens)
    for _ in range(16):
        token = int(np.argmax(model.scores[len(tokens) - 1]))
        assert token == int(ours(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
        model.eval([token])


@pytest.mark.llama
@pytest.mark.parametrize("attention", [None, (1,), ()], ids=["teacher", "hybrid", "pure"])
@torch.no_grad()
def test_llama_cpp_says_what_the_engine_says(tmp_path: Path, attention: tuple[int, ...] | None) -> None:
    """Trained weights and a real problem: the bundled teacher and what becomes of it, 160 greedy tokens."""
    source = runtime.ASSETS / "teacher"
    if attention is not None:
        source = tmp_path / "student"
        save_model(convert(load_model(runtime.ASSETS / "teacher"), LayerPlan(attention)), source)
    export_gguf(source, tmp_path / "m.gguf", "float32")
    ours = load_model(source)
    prompt = render_prompt(load_tokenizer(runtime.ASSETS / "teacher"), generate(5, 1, "held-out", [8])[0].problem)
    params = SamplingParams(max_tokens=160, temperature=0.0, ignore_eos=True)
    drawn = list(Engine(ours, 1, kv_dtype="float32").sample([prompt], 1, params)[0][0].token_ids)
    found = llama_logits(tmp_path / "m.gguf", [*prompt, *drawn], 1024)
    want = ours(torch.tensor([[*prompt, *drawn]]))[0].numpy()
    assert np.abs(found - want).max() < 2e-3
    assert found[len(prompt) - 1 : -1].argmax(-1).tolist() == drawn


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
