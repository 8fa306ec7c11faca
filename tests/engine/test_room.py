"""Memory planned from a budget: the arithmetic, what it refuses, and the same tokens on little of it."""

from collections.abc import Callable

import pytest
import torch

from thinkfast.engine import room
from thinkfast.engine.backends import NativeMemory, open_backend
from thinkfast.engine.engine import Engine
from thinkfast.engine.live import LiveEngine
from thinkfast.engine.sampling import SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.cache import AttentionCache, new_cache
from thinkfast.model.decoder import Decoder

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, seed=5)
PROMPTS = [[1, 2, 3] * 10, [4] * 25, [5, 6], [7] * 29, [8, 9, 10]]


def test_a_cache_takes_what_the_plan_says(any_model: Decoder) -> None:
    config = any_model.config
    cache = new_cache(config, 3, 64, torch.bfloat16)
    held = 0
    for layer in cache.layers:
        parts = (layer.keys, layer.values) if isinstance(layer, AttentionCache) else (layer.conv, layer.state)
        held += sum(part.nbytes for part in parts)
    planned = 3 * room.kept_bytes(config, 64, "bfloat16")
    padding = -(-config.head_dim // room.BLOCK) * room.BLOCK / config.head_dim
    assert held <= planned <= held * padding


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_a_native_state_takes_what_the_plan_says(any_model: Decoder, kv_dtype: str) -> None:
    memory = open_backend(any_model, "native", kv_dtype).memory(1, 64)
    assert isinstance(memory, NativeMemory)
    pool = memory._pool
    planned = room.kept_bytes(any_model.config, 64, kv_dtype)
    # Rings of inputs hold one more than the convolution reaches back to, and rows of them are padded.
    assert planned * 0.8 <= 2 * pool.page_bytes + pool.slot_bytes <= planned * 1.6, "64 tokens are two pages"


@pytest.mark.parametrize("name", ["attention", "pure", "hybrid"])
def test_a_budget_decides_slots_and_tokens_stay_the_same(make_model: Callable[..., Decoder], name: str) -> None:
    model = make_model(name)
    want = [[s.token_ids for s in row] for row in Engine(model, 8, kv_dtype="float32").sample(PROMPTS, 3, PARAMS)]
    sizes = Engine(model, kv_dtype="float32")
    each, kept = sizes.slot_bytes(50), sizes.kept_bytes(30)
    for slots, states in ((1, 2), (3, 2), (3, 4), (8, 6)):
        engine = Engine(model, 8, kv_dtype="float32", memory=slots * each + states * kept)
        assert engine.plan(50, 30).slots >= slots
        memory = engine._take_memory(engine.plan(50, 30).slots, 50)
        fed: list[int] = []
        prefill = memory.prefill

        def counted(
            prompts: list[tuple[int, ...]], behind: object, fed: list[int] = fed, prefill: object = prefill
        ) -> object:
            fed.extend(len(prompt) for prompt in prompts)
            return prefill(prompts, behind)

        memory.prefill = counted
        engine._memory = memory
        assert [[s.token_ids for s in row] for row in engine.sample(PROMPTS, 3, PARAMS)] == want, slots
        assert len(fed) >= 5
        if (slots, states) == (8, 6):
            assert len(fed) == 5, "what fits is fed once"
        if (slots, states) == (1, 2):
            assert len(fed) > 5, "what does not fit is fed again"


def test_what_cannot_fit_is_refused_at_the_call(make_model: Callable[..., Decoder]) -> None:
    model = make_model("attention")
    with pytest.raises(BadInput, match="memory is 0, expected 1 byte or more"):
        Engine(model, memory=0)
    engine = Engine(model, 4, memory=10_000)
    with pytest.raises(BadInput, match=r"one request of 50 tokens takes \d+\.\d KiB, expected at most .* 9.8 KiB"):
        engine.stream(PROMPTS, 1, PARAMS)
    with pytest.raises(BadInput, match="one request of 200 tokens takes"):
        LiveEngine(engine, 200)
    huge = Engine(make_model("attention", max_position_embeddings=10**9), 10**6)
    long = SamplingParams(max_tokens=10**6)
    with pytest.raises(BadInput, match=r"1000000 slots of 1000001 tokens take \d+\.\d GiB, .*: \d+ slots fit"):
        huge.stream([[1]], 1, long)


def test_a_live_engine_takes_the_slots_that_fit(make_model: Callable[..., Decoder]) -> None:
    model = make_model("hybrid")
    sizes = Engine(model)
    live = LiveEngine(Engine(model, 50, memory=3 * sizes.slot_bytes(64) + 2 * sizes.kept_bytes(64)), 64)
    try:
        assert live.slots == 3
    finally:
        live.close()
