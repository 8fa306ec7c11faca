"""The arithmetic of `thinkfast export --plan` against figures worked out by hand for known shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from thinkfast.errors import BadInput
from thinkfast.export import plan_model
from thinkfast.export.memory import HALF, KIB, SINGLE, memory_of
from thinkfast.model.checkpoint import load_model
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig


def student(hidden: int, heads: int, kv_heads: int, width: int, layers: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        layer_types=(ATTENTION, *[MAMBA] * (layers - 1)),
        mamba=MambaConfig(heads, width, width, heads),
    )


@pytest.mark.parametrize(
    ("shape", "half", "single"),
    [((2048, 32, 8, 64, 16), 160, 288), ((3072, 24, 8, 128, 28), 208, 400), ((1536, 12, 2, 128, 28), 416, 800)],
    ids=["llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b"],
)
def test_blocks_of_vllm(shape: tuple[int, ...], half: int, single: int) -> None:
    assert memory_of(student(*shape), HALF).block == half
    assert memory_of(student(*shape), SINGLE).block == single


def test_bytes_of_one_sequence() -> None:
    memory = memory_of(student(2048, 32, 8, 64, 16), HALF)
    assert (memory.state, memory.conv, memory.kv_token) == (256 * KIB, 36 * KIB, 2 * KIB)
    page = 160 * 2 * KIB
    assert memory.sequence(160) == page + 15 * page
    assert memory.sequence(161) == 2 * page + 15 * page
    assert memory.sequences(100 * memory.sequence(160) / 0.9 + 1, 0, 160) == 100
    assert memory.sequences(1, 2, 160) == 0


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "hybrid", "hybrid-bias", "pure-groups", "hybrid-untied-scaled"]
)
def test_parameters_are_counted_right(make_model: Callable[..., Path], name: str) -> None:
    model = load_model(make_model(name))
    extra = 0
    if ATTENTION not in model.config.layer_types:  # the inert layer
        one = replace(model.config, layer_types=(*model.config.layer_types, ATTENTION))
        extra = memory_of(one).parameters - sum(p.numel() for p in model.parameters())
        assert extra == 2 * 64 + 3 * 64 * 96 + 2 * 64 * 16 * 6
    assert memory_of(model.config).parameters == sum(p.numel() for p in model.parameters()) + extra


def test_the_plan_says_it_in_words(make_model: Callable[..., Path]) -> None:
    document, words = plan_model(make_model("hybrid"), "hf", None)
    assert document["dtype"] == "float32"
    assert document["weight_bytes"] == 4 * document["parameters"]
    assert f"{document['vllm_block_tokens']['float32']} tokens with a float32 state" in words
    assert len(words.splitlines()) == 8
    padded = plan_model(make_model("hybrid"), "gguf", None)[0]
    assert padded["dtype"] == "bfloat16"
    assert padded["state_bytes_layer"]["float32"] == 2 * document["state_bytes_layer"]["float32"]
    assert plan_model(make_model("llama"), "gguf", "q8_0")[0]["weight_bytes"] > 0
    assert len(plan_model(make_model("llama"), "hf", None)[1].splitlines()) == 6
    with pytest.raises(BadInput, match="dtype is 'int8', expected one of float32"):
        plan_model(make_model("llama"), "hf", "int8")
    with pytest.raises(BadInput, match="dtype is 'q8_0', expected one of float32, float16, bfloat16 for the format hf"):
        plan_model(make_model("llama"), "hf", "q8_0")
    with pytest.raises(BadInput, match="format is 'onnx', expected one of hf, gguf"):
        plan_model(make_model("llama"), "onnx", None)
    with pytest.raises(BadInput, match="the layers are Discrete Mamba-2, which no stock layout can express"):
        plan_model(make_model("hybrid", mamba=MambaConfig(4, 16, 16, 1, kind="discrete")), "hf", None)
