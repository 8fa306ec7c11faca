"""Logits and generation against the stock classes of transformers, loaded from and saved to the same directories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thinkfast.model.cache import new_cache
from thinkfast.model.checkpoint import load_model, read_config, save_model
from thinkfast.model.config import DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.layout import dump_config
from thinkfast.model.tensors import layout_of

transformers = pytest.importorskip(
    "transformers",
    minversion="5.23.0",
    reason="older transformers norm over all groups; `make test` installs a newer one",
)

CHANGES = {
    "llama-tied": ("llama", {}),
    "llama-untied-wide-heads": ("llama", {"tie_word_embeddings": False, "head_dim": 12, "rms_norm_eps": 1e-2}),
    "llama3-scaling": ("llama3", {}),
    "llama-no-groups": ("llama", {"num_kv_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_kv_heads": 1}),
    "hybrid-1": ("hybrid", {"n_groups": 1}),
    "hybrid-2-untied": ("hybrid", {"n_groups": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-2}),
    "hybrid-heads": ("hybrid", {"n_groups": 4, "d_state": 11}),
    "hybrid-scaling": ("hybrid", {"scaling": True, "head_dim": 12}),
    "hybrid-attention-last": ("hybrid", {"layer_types": ("mamba", "attention")}),
    "pure": ("pure", {}),
    "pure-heads": ("pure", {"n_groups": 4, "tie_word_embeddings": False}),
}


def make_config(tiny, name: str) -> DecoderConfig:
    base, changes = CHANGES[name]
    changes = dict(changes)
    config = tiny.configs[base]
    if changes.pop("scaling", False):
        config = replace(config, rope_scaling=tiny.configs["llama3"].rope_scaling)
    shape = {key: changes.pop(key) for key in ("n_groups", "d_state") if key in changes}
    if shape:
        config = replace(config, mamba=replace(config.mamba, **shape))
    return replace(config, **changes)


def stock_config(config: DecoderConfig):
    """The stock config object, built by the stock class out of keyword arguments, as a foreign program would."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    if config.rope_scaling is not None:
        common["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": config.rope_theta,
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_position_embeddings,
        }
    if "mamba" not in config.layer_types:
        return transformers.LlamaConfig(intermediate_size=config.intermediate_size, **common)
    return transformers.GraniteMoeHybridConfig(
        shared_intermediate_size=config.intermediate_size,
        layer_types=list(config.layer_types),
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="rope",
        attention_multiplier=config.head_dim**-0.5,
        mamba_n_heads=config.mamba.n_heads,
        mamba_d_head=config.mamba.head_dim,
        mamba_expand=config.mamba.d_inner // config.hidden_size,
        mamba_d_state=config.mamba.d_state,
        mamba_n_groups=config.mamba.n_groups,
        mamba_d_conv=config.mamba.d_conv,
        mamba_chunk_size=config.mamba.chunk_size,
        **common,
    )


def load_stock(path: Path):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], (kind, report[kind])
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(3, 53, (2, 45), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def assert_same_logits(ours: Decoder, stock, use_cache: bool = True) -> None:
    got, want = ours(tokens()), stock(tokens(), use_cache=use_cache).logits
    assert want.std() > 0.3
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", CHANGES)
def test_what_we_save_the_stock_class_computes(tiny, tmp_path: Path, name: str) -> None:
    model = tiny.random_decoder(make_config(tiny, name))
    save_model(model, tmp_path / "model")
    stock = load_stock(tmp_path / "model")
    assert_same_logits(model, stock)
    expected = "LlamaForCausalLM" if name.startswith("llama") else "GraniteMoeHybridForCausalLM"
    assert type(stock).__name__ == expected


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_stock_class_saves_we_compute(tiny, tmp_path: Path, name: str) -> None:
    config = make_config(tiny, name)
    stock = transformers.AutoModelForCausalLM.from_config(stock_config(config), attn_implementation="eager")
    tiny.randomise(stock.eval(), seed=7)
    stock.save_pretrained(tmp_path)
    assert read_config(tmp_path) == config
    assert_same_logits(load_model(tmp_path), stock, use_cache=False)


@pytest.mark.parametrize("name", ["llama3-scaling", "hybrid-2-untied", "pure"])
@torch.no_grad()
def test_greedy_generation_is_the_same(tiny, tmp_path: Path, name: str) -> None:
    model = tiny.random_decoder(replace(make_config(tiny, name), eos_token_ids=()))
    save_model(model, tmp_path / "model")
    stock = load_stock(tmp_path / "model")
    prompt = tokens()[:, :9]
    want = stock.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30, use_cache=True
    )
    cache = new_cache(model.config, 2, 40, torch.float32)
    got, logits = prompt, model(prompt, cache)
    for _ in range(30):
        picked = logits[:, -1:].argmax(-1)
        got = torch.cat((got, picked), dim=1)
        logits = model(picked, cache)
    assert want.shape == (2, 39)
    assert torch.equal(got, want)


def test_the_end_of_text_tokens_arrive_in_generation(tiny, tmp_path: Path) -> None:
    model = tiny.random_decoder(replace(tiny.configs["pure"], eos_token_ids=(5, 7), pad_token_id=3))
    save_model(model, tmp_path / "model")
    generation = load_stock(tmp_path / "model").generation_config
    assert generation.eos_token_id == [5, 7]
    assert generation.pad_token_id == 3


def test_shards_and_half_precision_of_the_stock_class_load(tiny, tmp_path: Path) -> None:
    config = make_config(tiny, "hybrid-heads")
    stock = transformers.AutoModelForCausalLM.from_config(stock_config(config), attn_implementation="eager")
    tiny.randomise(stock.eval(), seed=7)
    stock.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_logits(load_model(tmp_path), load_stock(tmp_path))


def test_the_config_says_the_same_to_readers_of_the_old_and_the_new_rope_fields(tiny, tmp_path: Path) -> None:
    config = make_config(tiny, "hybrid-scaling")
    raw = dump_config(config, layout_of(config), torch.float32)
    variants = {
        "both": raw,
        "new": {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")},
        "old": {key: value for key, value in raw.items() if key != "rope_parameters"},
    }
    for name, variant in variants.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(variant))
        stock = transformers.AutoConfig.from_pretrained(tmp_path / name)
        assert stock.rope_parameters["rope_theta"] == config.rope_theta
        assert stock.rope_parameters["rope_type"] == "llama3"
        assert read_config(tmp_path / name) == config
    assert raw["layer_types"] == ["mamba", "attention", "mamba"]
    assert "time_step_limit" not in raw
