from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.engine.backends import open_backend
from thinkfast.engine.sampling import SamplingParams, draw, prompt_key, sample_key, uniform
from thinkfast.engine.slots import SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder


def many(logits: list[float], params: SamplingParams, count: int = 20000) -> np.ndarray:
    rows = np.tile(np.asarray(logits, np.float32), (count, 1))
    keys = np.array([sample_key(prompt_key(params.seed, [1]), i) for i in range(count)], np.uint64)
    return draw(rows, keys, np.zeros(count, np.int64), params)[0]


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * len(tokens)
    return float(
        (((np.bincount(tokens, minlength=len(expected)) - expected) ** 2)[expected > 0] / expected[expected > 0]).sum()
    )


def softmax(logits: list[float], temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    return weights / weights.sum()


LOGITS = [0.3, -1.0, 2.0, 0.0, 1.1, -3.0, 0.5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    tokens = many(LOGITS, SamplingParams(temperature=temperature))
    assert chi_square(tokens, softmax(LOGITS, temperature)) < 22.5, "99.9 % quantile at 6 degrees of freedom"
    assert chi_square(tokens, softmax(LOGITS, temperature * 1.1)) > 22.5


def test_top_k_then_top_p() -> None:
    """Probabilities .4 .3 .2 .1: top_k 3 leaves .444 .333 .222, of which top_p .7 keeps two, top_p .8 three."""
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    for top_k, top_p, kept in (
        (3, 0.7, [1, 3]),
        (3, 0.8, [1, 2, 3]),
        (0, 0.75, [1, 2, 3]),
        (0, 0.39, [1]),
        (1, 1.0, [1]),
    ):
        probabilities = np.where(np.isin(range(4), kept), np.exp(logits), 0.0)
        tokens = many(logits, SamplingParams(top_k=top_k, top_p=top_p))
        assert sorted(set(tokens.tolist())) == kept
        assert chi_square(tokens, probabilities / probabilities.sum()) < 16.3


def test_equal_logits_keep_the_smaller_ids() -> None:
    assert set(many([1.0, 1.0, 1.0, 1.0], SamplingParams(top_k=2)).tolist()) == {0, 1}
    assert set(many([1.0, 1.0, 1.0, 1.0], SamplingParams(top_p=0.5)).tolist()) == {0, 1}
    assert set(many([0.0, 1.0, 1.0], SamplingParams(temperature=0.0)).tolist()) == {1}


def test_cutting_nothing_changes_nothing() -> None:
    plain = many(LOGITS, SamplingParams(seed=5), 500)
    np.testing.assert_array_equal(plain, many(LOGITS, SamplingParams(seed=5, top_k=7), 500))
    np.testing.assert_array_equal(plain, many(LOGITS, SamplingParams(seed=5, top_k=99), 500))


def test_log_probabilities_are_untempered_and_uncut() -> None:
    rows, keys = np.array([LOGITS], np.float32), np.array([3], np.uint64)
    token, logprob = draw(rows, keys, np.zeros(1, np.int64), SamplingParams(temperature=0.3, top_k=2))
    assert logprob[0] == pytest.approx(np.log(softmax(LOGITS)[token[0]]), abs=1e-6)


@pytest.mark.parametrize("bad", [[0.0, np.nan], [np.nan, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_without_a_finite_maximum_give_no_token(bad: list[float]) -> None:
    rows = np.array([bad, [0.0, -np.inf]], np.float32)
    token, logprob = draw(rows, np.zeros(2, np.uint64), np.zeros(2, np.int64), SamplingParams())
    assert token.tolist() == [-1, 0]
    assert np.isnan(logprob[0])
    assert logprob[1] == 0.0


def test_uniform_numbers_are_uniform_and_a_function_of_key_and_counter() -> None:
    keys = np.array([prompt_key(0, [1, 2]), prompt_key(0, [2, 1]), prompt_key(1, [1, 2])], np.uint64).repeat(3000)
    counters = np.tile(np.arange(3000), 3)
    numbers = uniform(keys, counters)
    assert chi_square((numbers * 20).astype(int), np.full(20, 0.05)) < 43.8
    assert len(set(numbers.tolist())) == 9000
    np.testing.assert_array_equal(uniform(keys[5:6], counters[5:6]), numbers[5:6])


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.05, 0.8, 1.0, 3.0]),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([1.0, 0.99, 0.7, 0.2, 1e-6]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_the_kernels_draw_what_numpy_draws(
    make_model: Callable[..., Decoder], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    model = make_model("attention")
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    memory = open_backend(model, "native").memory(40, 4)
    table = SlotTable(40, params, 50, ())
    for slot in range(40):
        table.admit(slot, (0, 0), slot, 0, sample_key(prompt_key(seed, [slot]), slot), 0.0)
    logits = np.empty((40, 50), np.float32)
    tokens, logprobs = memory.step(table, np.arange(40, dtype=np.int32), logits)
    want, want_logprobs = draw(logits, table.key, table.count, params)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=0, atol=1e-12)


def test_the_kernels_cut_ties_and_large_vocabularies_as_numpy_does(make_model: Callable[..., Decoder]) -> None:
    model = make_model("attention", vocab_size=3001)
    with torch.no_grad():
        model.embed_tokens.weight[1000:2000] = model.embed_tokens.weight[:1000]
    memory = open_backend(model, "native").memory(30, 4)
    for params in (SamplingParams(top_k=41), SamplingParams(top_p=0.9), SamplingParams(top_k=7, top_p=0.8)):
        table = SlotTable(30, params, 3001, ())
        for slot in range(30):
            table.admit(slot, (0, 0), slot, 0, sample_key(9, slot), 0.0)
        logits = np.empty((30, 3001), np.float32)
        tokens, _ = memory.step(table, np.arange(30, dtype=np.int32), logits)
        np.testing.assert_array_equal(tokens, draw(logits, table.key, table.count, params)[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("seed", 2**63),
        ("stop", ((),)),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"^{field} .*expected"):
        SamplingParams(**{field: value})
