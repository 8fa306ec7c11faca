"""Every backend against `Decoder.forward` without a cache, over shapes that leave the paved road."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from thinkfast.engine.backends import Backend, open_backend
from thinkfast.engine.engine import Engine
from thinkfast.engine.sampling import SamplingParams
from thinkfast.engine.slots import SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder
from thinkfast.ops.cpu.native import library

GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


def stepped(backend: Backend, ids: np.ndarray, prefilled: int) -> np.ndarray:
    """Logits behind ids[:, prefilled:], (rows, steps, vocab), after a prefill of the first tokens and a fork."""
    rows, length = ids.shape
    memory = backend.memory(rows, length)
    table = SlotTable(rows, GREEDY, 1000, ())
    kept = memory.prefill([row[:prefilled].tolist() for row in ids])
    for row in range(rows):
        memory.fork(kept[row], row)
        table.admit(row, (0, 0), 0, prefilled, 0, 0.0)
    seen = []
    every = np.arange(rows, dtype=np.int32)
    for t in range(prefilled, length):
        table.token[:], table.position[:] = ids[:, t], t
        logits = np.empty((rows, VOCAB[id(backend)]), np.float32)
        memory.step(table, every, logits)
        seen.append(logits)
    return np.stack(seen, 1)


VOCAB: dict[int, int] = {}


def opened(model: Decoder, name: str, kv_dtype: str = "float32") -> Backend:
    backend = open_backend(model, name, kv_dtype)
    VOCAB[id(backend)] = model.config.vocab_size
    return backend


def reference(model: Decoder, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).numpy()


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("prefilled", [0, 1, 70])
def test_steps_after_a_prefill_equal_the_forward(any_model: Decoder, name: str, prefilled: int) -> None:
    ids = np.random.default_rng(1).integers(0, any_model.config.vocab_size, (3, 75))
    want = reference(any_model, ids)[:, prefilled:]
    got = stepped(opened(any_model, name), ids, prefilled)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_bfloat16_keys_and_values_stay_near(make_model: Callable[..., Decoder]) -> None:
    model = make_model("wide_sharing")
    ids = np.random.default_rng(1).integers(0, 50, (3, 75))
    want = reference(model, ids)
    error = np.abs(stepped(opened(model, "native", "bfloat16"), ids, 10) - want[:, 10:]).max() / np.abs(want).max()
    assert 1e-5 < error < 3e-2, "rounded to 8 bits, and no worse"


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_a_fork_is_bitwise_a_fresh_prefill(any_model: Decoder, kv_dtype: str) -> None:
    """Also one token at a time: prefill and decode are the same arithmetic."""
    ids = np.random.default_rng(2).integers(0, any_model.config.vocab_size, (2, 70))
    backend = opened(any_model, "native", kv_dtype)
    one_by_one = stepped(backend, ids, 0)
    for prefilled in (1, 64, 65, 69):
        np.testing.assert_array_equal(stepped(backend, ids, prefilled), one_by_one[:, prefilled:])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 37, 64, 80])
def test_a_row_does_not_see_its_neighbours(any_model: Decoder, rows: int) -> None:
    ids = np.random.default_rng(3).integers(0, any_model.config.vocab_size, (80, 20))
    backend = opened(any_model, "native", "bfloat16")
    np.testing.assert_array_equal(stepped(backend, ids[:rows], 13), stepped(backend, ids, 13)[:rows])


def test_a_nan_does_not_reach_the_next_sample_of_a_slot(make_model: Callable[..., Decoder]) -> None:
    """Token 7's embedding is broken; the slot that read it must serve the next prompt as if new."""
    model = make_model("hybrid")
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
        model.lm_head = torch.nn.Linear(32, 50, bias=False)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    for name in ("native", "torch"):
        engine = Engine(model, slots=1, backend=name)
        broken, sound = engine.sample([[1, 7, 2, 9, 9, 9], [1, 2]], 1, params)
        assert (broken[0].finish_reason, broken[0].token_ids, broken[0].logprob_sum) == ("error", (), 0.0)
        assert sound[0].finish_reason == "length"
        assert sound[0].token_ids == Engine(model, slots=1, backend=name).sample([[1, 2]], 1, params)[0][0].token_ids


def test_without_a_compiler_torch_serves(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model("pure")
    with_compiler = Engine(model, slots=3)
    assert with_compiler.backend == "native"
    library.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        without = Engine(model, slots=3)
        assert without.backend == "torch"
        with pytest.raises(BadInput, match="no C\\+\\+ compiler: looked for c\\+\\+, g\\+\\+, clang\\+\\+"):
            Engine(model, backend="native")
        params = SamplingParams(max_tokens=20, seed=4)
        tokens = [
            [[s.token_ids for s in row] for row in e.sample([[1, 2], [5]], 3, params)] for e in (with_compiler, without)
        ]
        assert tokens[0] == tokens[1]
    finally:
        library.cache_clear()


@pytest.mark.parametrize(("field", "value"), [("backend", "cuda"), ("kv_dtype", "int4")])
def test_unknown_names_are_refused(make_model: Callable[..., Decoder], field: str, value: str) -> None:
    with pytest.raises(BadInput, match=f"{field} is '{value}', expected one of"):
        Engine(make_model("pure"), **{field: value})
