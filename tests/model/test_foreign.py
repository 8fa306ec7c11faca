"""Layouts of other families against their public implementations, on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from thinkfast.engine import Engine, SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, read_config, save_model

transformers = pytest.importorskip(
    "transformers",
    minversion="5.23.0",
    reason="older transformers norm over all groups; `make test` installs a newer one",
)

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 8}
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
BAMBA = {**SHAPE, **MAMBA, **TOKENS, "intermediate_size": 44, "attn_layer_indices": [1]}
GRANITE = {**SHAPE, **MAMBA, **TOKENS, "shared_intermediate_size": 44, "num_local_experts": 0, "num_experts_per_tok": 0}
GRANITE |= {"layer_types": ["mamba", "attention", "mamba"]}
SCALES = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
    "attention_multiplier": 0.015625,
}
MAMBA2 = {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 6}
MAMBA2 |= {**TOKENS, "n_groups": 2, "chunk_size": 8}
CASES = {
    "bamba": ("BambaForCausalLM", BAMBA),
    "bamba-tied": ("BambaForCausalLM", {**BAMBA, "tie_word_embeddings": True, "mamba_conv_bias": False}),
    "bamba-all-channels": (
        "BambaForCausalLM",
        {**BAMBA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    ),
    "granite-scales": ("GraniteMoeHybridForCausalLM", {**GRANITE, **SCALES, "position_embedding_type": "rope"}),
    "granite-tied-no-positions": ("GraniteMoeHybridForCausalLM", {**GRANITE, **SCALES, "tie_word_embeddings": True}),
    "granite-no-bias": ("GraniteMoeHybridForCausalLM", {**GRANITE, "mamba_conv_bias": False}),
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "mamba2-tied": ("Mamba2ForCausalLM", {**MAMBA2, "tie_word_embeddings": True, "n_groups": 1}),
    "mamba2-no-bias": ("Mamba2ForCausalLM", {**MAMBA2, "use_conv_bias": False}),
}


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Every parameter away from its usual 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.5
            centre = 0.0 if parameter.dim() > 1 else 0.3
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def stock_model(name: str, path: Path):
    """A random model of a stock class, saved."""
    kind, fields = CASES[name]
    stock_class = getattr(transformers, kind)
    model = stock_class(stock_class.config_class(**fields)).eval()
    randomise(model)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_stock_class(tmp_path: Path, name: str) -> None:
    stock = stock_model(name, tmp_path)
    ours = load_model(tmp_path)
    assert ours.config == read_config(tmp_path)
    ids = torch.randint(53, (2, 21), generator=torch.Generator().manual_seed(1))
    want = stock(ids, use_cache=False).logits
    assert want.std() > 0.02
    assert (ours(ids) - want).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", ["bamba", "granite-tied-no-positions", "mamba2"])
@torch.no_grad()
def test_the_engine_generates_what_the_stock_class_does(tmp_path: Path, name: str, backend: str) -> None:
    stock = stock_model(name, tmp_path)
    prompt = [5, 17, 30, 8, 44]
    want = stock.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    engine = Engine(load_model(tmp_path), slots=2, backend=backend, kv_dtype="float32")
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    assert list(engine.sample([prompt], 1, params)[0][0].token_ids) == want[0, 5:].tolist()


@pytest.mark.parametrize("name", ["granite-tied-no-positions", "mamba2"])
@torch.no_grad()
def test_what_was_folded_is_written_as_granite(tmp_path: Path, name: str) -> None:
    """The multipliers are in the weights, a model without feed-forward layers has one that adds zero."""
    stock = stock_model(name, tmp_path / "there")
    save_model(load_model(tmp_path / "there"), tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ids = torch.arange(20)[None]
    want = stock(ids, use_cache=False).logits
    assert (again(ids, use_cache=False).logits - want).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))


@torch.no_grad()
def test_partial_rotation_is_not_written(tmp_path: Path) -> None:
    stock_model("bamba", tmp_path / "there")
    with pytest.raises(BadInput, match="turns 4 of 8 channels"):
        save_model(load_model(tmp_path / "there"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


@torch.no_grad()
def test_the_layout_of_mamba_ssm_in_a_pickled_file(tmp_path: Path) -> None:
    """state-spaces/mamba2-* have this one: other names for the same numbers, and a vocabulary that is padded."""
    stock = stock_model("mamba2-tied", tmp_path / "hf")
    state = {name.replace("embeddings", "embedding"): tensor for name, tensor in stock.state_dict().items()}
    mixer = {"layer": "Mamba2", "d_state": 6, "headdim": 8, "chunk_size": 8}
    raw = {"d_model": 32, "n_layer": 3, "vocab_size": 51, "ssm_cfg": mixer, "pad_vocab_size_multiple": 53}
    (tmp_path / "ssm").mkdir()
    (tmp_path / "ssm" / "config.json").write_text(json.dumps({**raw, "rms_norm": True, "attn_layer_idx": []}))
    torch.save(state, tmp_path / "ssm" / "pytorch_model.bin")
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(tmp_path / "ssm")(ids), load_model(tmp_path / "hf")(ids))

    (tmp_path / "ssm" / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin: not a file of tensors"):
        load_model(tmp_path / "ssm")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("bamba", {"mlp_bias": True}, "mlp_bias is True"),
        ("bamba", {"attn_layer_indices": [3]}, "attn_layer_indices is [3]"),
        ("bamba", {"time_step_limit": [0.0, 1.0]}, "time_step_limit is [0.0, 1.0], expected no limit"),
        ("mamba2", {"use_bias": True}, "use_bias is True"),
        ("mamba2", {"num_heads": 9}, "num_heads is 9"),
        ("mamba2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("granite-scales", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ("granite-scales", {"num_local_experts": 4}, "num_local_experts is 4"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, name: str, changes: dict, expected: str) -> None:
    stock_model(name, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(BadInput) as caught:
        load_model(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
