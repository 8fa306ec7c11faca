"""The teachers' families against their stock classes: logits, caches, the engine, saving, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from thinkfast.engine.backends import open_backend
from thinkfast.engine.engine import Engine
from thinkfast.engine.sampling import SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.cache import new_cache
from thinkfast.model.checkpoint import load_model, read_config, save_model
from thinkfast.model.decoder import Decoder
from thinkfast.model.layout import dump_config

transformers = pytest.importorskip(
    "transformers",
    minversion="5.23.0",
    reason="older transformers norm over all groups; `make test` installs a newer one",
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "smollm": ("Llama", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-wide-window": ("Mistral", {"sliding_window": 128}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-narrow": ("Qwen3", {"head_dim": 6, "num_key_value_heads": 1}),
}


def stock_model(tiny, name: str):
    """A random model of the stock class, every parameter away from its usual value."""
    family, changes = FAMILIES[name]
    fields = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 3e-4,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    } | changes
    config = getattr(transformers, f"{family}Config")(**fields)
    stock = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tiny.randomise(stock.eval(), seed=11)
    return stock


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(3, 53, (2, length), generator=torch.Generator().manual_seed(4))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.std() > 0.3
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_with_and_without_caches_and_the_same_layout_after_saving(tiny, tmp_path: Path, name: str) -> None:
    stock = stock_model(tiny, name)
    want = stock(tokens()).logits
    stock.save_pretrained(tmp_path / "stock")
    model = load_model(tmp_path / "stock")
    assert read_config(tmp_path / "stock") == model.config
    assert_close(model(tokens()), want)

    cache = new_cache(model.config, 2, 40, torch.float32)
    pieces = [model(tokens()[:, :17], cache)] + [model(tokens()[:, i : i + 1], cache) for i in range(17, 40)]
    assert_close(torch.cat(pieces, dim=1), want)

    save_model(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(stock)
    assert_close(again.eval()(tokens()).logits, want)
    assert load_model(tmp_path / "ours").config == model.config
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == stock_names(tmp_path / "stock")


def stock_names(path: Path) -> set[str]:
    return set(load_file(path / "model.safetensors"))


@pytest.mark.parametrize(("name", "reason"), [("qwen2", "QKV bias"), ("qwen3", "QK norm")])
def test_the_engine_samples_from_them_in_torch_and_says_why(tiny, tmp_path: Path, name: str, reason: str) -> None:
    stock_model(tiny, name).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    model.config = replace(model.config, eos_token_ids=())
    assert open_backend(model).name == "torch"
    with pytest.raises(BadInput, match=f"the kernels have no {reason}"):
        open_backend(model, "native")
    prompt = tokens()[0, :9].tolist()
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    got = Engine(model, slots=2).sample([prompt], n=1, params=greedy)[0][0].token_ids
    want = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            want.append(int(model(torch.tensor([want]))[0, -1].argmax()))
    assert np.array_equal(got, want[9:])


def sharded(tiny, path: Path) -> None:
    stock_model(tiny, "qwen2").save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2


@torch.no_grad()
def test_shards_load_and_a_missing_one_is_named(tiny, tmp_path: Path) -> None:
    sharded(tiny, tmp_path)
    want = stock_model(tiny, "qwen2")(tokens()).logits
    assert_close(load_model(tmp_path)(tokens()), want)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BadInput, match=rf"weight_map names missing files: {gone.name}$"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("mistral", {"sliding_window": 64}, "sliding_window is 64, expected null or at least max_position_embeddings"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5}, "sliding_window is 5"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, r"layer_types\[1\] is"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("llama2", {"attention_bias": True}, "attention_bias is True"),
        ("llama2", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
        ("llama2", {"model_type": "gemma3_text"}, "model_type is 'gemma3_text', supported are 'llama', 'mistral'"),
        ("llama2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tiny, tmp_path: Path, name, changes, complaint) -> None:
    stock_model(tiny, name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for read in (read_config, load_model):
        with pytest.raises(BadInput, match=complaint) as caught:
            read(tmp_path)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_window_as_long_as_the_context_changes_nothing(tiny, tmp_path: Path) -> None:
    stock_model(tiny, "mistral-wide-window").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == 128
    assert read_config(tmp_path).max_position_embeddings == 128


@torch.no_grad()
def test_a_hybrid_keeps_the_biases_of_its_attention_layers(tiny, tmp_path: Path) -> None:
    config = replace(tiny.configs["hybrid"], qkv_bias=True, layer_types=("attention", "mamba", "attention"))
    model = tiny.random_decoder(config)
    save_model(model, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(stock).__name__ == "GraniteMoeHybridForCausalLM"
    assert_close(model(tokens()), stock(tokens()).logits)
    assert read_config(tmp_path) == config
    assert_close(load_model(tmp_path)(tokens()), model(tokens()))

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.bias"
    assert not tensors[name].any()
    save_file(tensors | {name: tensors[name] + 1e-3}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=rf"{name} is not zero"):
        load_model(tmp_path)


@torch.no_grad()
def test_the_score_multiplier_of_a_biased_hybrid_scales_the_bias_too(tiny, tmp_path: Path) -> None:
    model = tiny.random_decoder(replace(tiny.configs["hybrid"], qkv_bias=True))
    save_model(model, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_multiplier": 0.1}))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert_close(load_model(tmp_path)(tokens()), stock(tokens()).logits)


@pytest.mark.parametrize(
    "changes", [{"qkv_bias": True}, {"qk_norm": True}, {"family": "qwen2"}, {"family": "qwen3", "qkv_bias": True}]
)
def test_no_family_is_written_with_the_arithmetic_of_another(tiny, changes: dict) -> None:
    config = replace(tiny.configs["llama"], **changes)
    with pytest.raises(BadInput, match="cannot express qkv_bias"):
        dump_config(config, config.family, torch.float32)


def test_a_hybrid_with_normed_queries_is_not_written(tiny, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="norm queries and keys"):
        save_model(Decoder(replace(tiny.configs["hybrid"], qk_norm=True)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
