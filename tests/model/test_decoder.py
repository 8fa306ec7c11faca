"""A decoder with a cache against its full forward: any split, ragged rows, forked rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.model.cache import AttentionCache, new_cache

NAMES = ("llama3", "hybrid", "pure")


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 53, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, 29), max_size=6), seed=st.integers(0, 99))
@torch.no_grad()
def test_cached_parts_equal_the_full_forward(tiny, name: str, cuts: set[int], seed: int) -> None:
    model = tiny.random_decoder(tiny.configs[name], seed)
    ids = tokens(2, 30, seed)
    cache = new_cache(model.config, 2, 30, torch.float32)
    ends = [*sorted(cuts), 30]
    got = [model(ids[:, a:b], cache) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert_close(torch.cat(got, dim=1), model(ids))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rows_of_different_length_decode_together(tiny, name: str) -> None:
    model = tiny.random_decoder(tiny.configs[name])
    lengths = [3, 11, 1, 7]
    ids = tokens(4, 20)
    cache = new_cache(model.config, 5, 20, torch.float32)
    places = torch.tensor([4, 0, 2, 1])
    for row, length in enumerate(lengths):
        single = new_cache(model.config, 1, 16, torch.float32)
        model(ids[row : row + 1, :length], single)
        cache.copy_rows(single, torch.tensor([0]), places[row : row + 1])
    for step in range(5):
        batch = torch.zeros(5, 1, dtype=torch.int64)
        for row, length in enumerate(lengths):
            batch[places[row], 0] = ids[row, length + step]
        got = model(batch, cache)
        for row, length in enumerate(lengths):
            want = model(ids[row : row + 1, : length + step + 1])[0, -1]
            assert_close(got[places[row], 0], want)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_many_samples_fork_from_one_prefill(tiny, name: str) -> None:
    model = tiny.random_decoder(tiny.configs[name])
    prompt, tails = tokens(1, 9), tokens(3, 6, seed=5)
    source = new_cache(model.config, 1, 9, torch.float32)
    model(prompt, source)
    cache = new_cache(model.config, 3, 20, torch.float32)
    cache.copy_rows(source, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    got = torch.cat([model(tails[:, i : i + 1], cache) for i in range(6)], dim=1)
    assert_close(got, model(torch.cat((prompt.expand(3, -1), tails), dim=1))[:, 9:])
    # A reused row must forget its last tenant.
    cache.copy_rows(source, torch.tensor([0]), torch.tensor([1]))
    again = model(tails[:, :1], cache)
    assert_close(again[1], model(torch.cat((prompt, tails[1:2, :1]), dim=1))[0, 9:])


@torch.no_grad()
def test_no_position_sees_a_later_one(tiny) -> None:
    for config in tiny.configs.values():
        model = tiny.random_decoder(config)
        ids = tokens(1, 20)
        changed = ids.clone()
        changed[0, 12:] = (changed[0, 12:] + 1) % config.vocab_size
        before, after = model(ids), model(changed)
        assert torch.allclose(before[:, :12], after[:, :12], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before[:, 12:], after[:, 12:], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_full_cache_and_a_foreign_one_are_refused(tiny) -> None:
    model = tiny.random_decoder(tiny.configs["llama"])
    cache = new_cache(model.config, 1, 4, torch.float32)
    model(tokens(1, 3), cache)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        model(tokens(1, 2), cache)
    assert isinstance(cache.layers[0], AttentionCache)
    assert cache.layers[0].lengths.tolist() == [3]
    with pytest.raises(ValueError, match="keys and values"):
        tiny.random_decoder(tiny.configs["pure"])(tokens(1, 2), cache)
    foreign = new_cache(tiny.configs["hybrid"], 1, 4, torch.float32)
    with pytest.raises(ValueError, match="different layers"):
        cache.copy_rows(foreign, torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"layer_types": ("attention", "conv")}, r"layer_types\[1\] is 'conv'"),
        ({"mamba": None, "layer_types": ("mamba",)}, "no mamba shape"),
    ],
)
def test_impossible_shapes_are_refused(tiny, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny.configs["hybrid"], **change)


def test_every_parameter_learns(tiny) -> None:
    model = tiny.random_decoder(replace(tiny.configs["hybrid"], tie_word_embeddings=False))
    torch.nn.functional.cross_entropy(model(tokens(2, 12)).flatten(0, 1), tokens(2, 12, seed=1).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
