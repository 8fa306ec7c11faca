"""The whole GPU back end, in Triton's interpreter or on a GPU: it draws what the decoder in torch draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the extra dev, with `make test`, on Linux")

from thinkfast.engine.backends import open_backend
from thinkfast.engine.engine import Engine
from thinkfast.engine.gpu import AHEAD, GpuBackend
from thinkfast.engine.sampling import Sample, SamplingParams, sample_key
from thinkfast.engine.slots import SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.config import DISCRETE, MambaConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
A, M = "attention", "mamba"
SMALL: dict[str, dict[str, object]] = {
    "attention": {"layer_types": (A,), "num_heads": 2, "num_kv_heads": 1},
    "pure": {"layer_types": (M,), "mamba": MambaConfig(2, 8, 8, 2)},
    "hybrid": {"layer_types": (M, A), "mamba": MambaConfig(2, 5, 4, 1, d_conv=3), "num_heads": 3, "num_kv_heads": 1},
}
PROMPTS = [[1, 5, 7, 9], [2]]


@pytest.fixture(params=sorted(SMALL))
def small(request: pytest.FixtureRequest, make_model):
    return make_model("attention", **SMALL[request.param]).to(DEVICE)


def on_gpu(model, slots: int, **options: object) -> Engine:
    engine = Engine(model, slots, "torch")
    engine._backend = GpuBackend(model, **options)
    return engine


def assert_same(got: list[list[Sample]], want: list[list[Sample]]) -> None:
    for row, expected in zip(got, want, strict=True):
        for sample, other in zip(row, expected, strict=True):
            assert (sample.token_ids, sample.finish_reason) == (other.token_ids, other.finish_reason)
            assert sample.logprob_sum == pytest.approx(other.logprob_sum, abs=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=3, temperature=0.9, top_k=9, top_p=0.8, seed=5),
    ],
    ids=["greedy", "drawn"],
)
def test_it_draws_what_the_decoder_draws(small, params: SamplingParams) -> None:
    # Three samples in two slots: the third goes into a slot that another has left.
    engine = on_gpu(small, 2, ring=2)
    assert_same(engine.sample(PROMPTS[:1], 3, params), Engine(small, 2, "torch").sample(PROMPTS[:1], 3, params))


def test_a_prompt_may_be_fed_in_pieces(small) -> None:
    memory = GpuBackend(small).memory(1, 8)
    whole = memory.prefill([[4, 5, 6]])[0]
    half = memory.prefill([[4]])[0]
    both = memory.prefill([[5, 6]], [half])[0]
    assert both.length == whole.length == 3
    for one, other in zip(both.state.layers, whole.state.layers, strict=True):
        for name in ("keys", "values", "conv", "state"):
            if hasattr(one, name):
                assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5)


def test_a_burst_is_as_many_steps(small) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.8, ignore_eos=True)
    drawn = []
    for bursts in ([1, 1, 1], [3]):
        memory = GpuBackend(small, ring=2).memory(2, 12)
        table = SlotTable(2, params, small.config.vocab_size, ())
        rows = np.array([1, 0], np.int32)
        for slot, prompt in enumerate(PROMPTS):
            memory.fork(memory.prefill([prompt[:-1]])[0], slot)
            table.admit(slot, (slot, 0), prompt[-1], len(prompt) - 1, sample_key(9, slot), 0.0)
        for steps in bursts:
            assert steps <= AHEAD
            for tokens, logprobs in zip(*memory.burst(table, rows, steps), strict=True):
                table.advance(rows, tokens, logprobs)
        drawn.append([table.history[slot, : table.count[slot]].tolist() for slot in range(2)])
    assert drawn[0] == drawn[1]


def test_logits_are_those_of_the_decoder(small) -> None:
    memory = GpuBackend(small).memory(1, 8)
    params = SamplingParams(temperature=0)
    table = SlotTable(1, params, small.config.vocab_size, ())
    memory.fork(memory.prefill([[4, 5]])[0], 0)
    table.admit(0, (0, 0), 6, 2, 0, 0.0)
    logits = np.empty((1, small.config.vocab_size), np.float32)
    tokens, _ = memory.step(table, np.zeros(1, np.int32), logits)
    with torch.inference_mode():
        want = small(torch.tensor([[4, 5, 6]], device=DEVICE))[0, -1].cpu().numpy()
    assert np.abs(logits[0] - want).max() < 1e-4
    assert tokens[0] == want.argmax()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the NaN that is put in here
def test_a_broken_sample_leaves_the_others_alone(small) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    want = Engine(small, 2, "torch").sample([PROMPTS[0]], 1, params)[0][0]
    memory = GpuBackend(small).memory(2, 12)
    table = SlotTable(2, params, small.config.vocab_size, ())
    good, bad = memory.prefill([PROMPTS[0][:-1]])[0], memory.prefill([PROMPTS[0][:-1]])[0]
    with torch.inference_mode():
        for layer in bad.state.layers:
            for name in ("values", "state"):
                if hasattr(layer, name):
                    getattr(layer, name).fill_(float("nan"))
    for slot, kept in enumerate((good, bad)):
        memory.fork(kept, slot)
        table.admit(slot, (0, slot), PROMPTS[0][-1], len(PROMPTS[0]) - 1, 0, 0.0)
    tokens, logprobs = memory.burst(table, np.arange(2, dtype=np.int32), 4)
    assert tuple(tokens[:, 0].tolist()) == want.token_ids
    assert (tokens[:, 1] == -1).all()
    assert np.isnan(logprobs[:, 1]).all()


def test_by_name(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("attention").to(DEVICE)
    assert open_backend(model, "triton").name == "triton"
    assert open_backend(model).name == ("triton" if DEVICE == "cuda" else open_backend(model).name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match="backend 'triton' needs a model on a gpu"):
        open_backend(make_model("attention"), "triton")


def test_a_mixer_without_a_kernel_is_refused_by_name(make_model) -> None:
    model = make_model("pure", mamba=MambaConfig(4, 8, 16, 4, kind=DISCRETE)).to(DEVICE)
    with pytest.raises(BadInput, match="backend 'triton': there is no kernel for DiscreteMamba2"):
        open_backend(model, "triton")


def test_bursts_end_with_what_the_rows_need_and_with_the_time(small) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    memory = GpuBackend(small).memory(1, 8)
    table = SlotTable(1, params, small.config.vocab_size, ())
    memory.fork(memory.prefill([[]])[0], 0)
    table.admit(0, (0, 0), 6, 0, 0, 0.0)
    rows = np.zeros(1, np.int32)
    assert len(memory.run_ahead(table, rows, math.inf)[0]) == 1  # nothing is known of the pace yet
    assert len(memory.run_ahead(table, rows, math.inf)[0]) == 3
    assert len(memory.run_ahead(table, rows, 0.0)[0]) == 1


def test_the_engine_hands_over_whole_bursts(small) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.7, seed=1)
    engine = Engine(small, 2, "triton")
    assert engine.backend == "triton"
    assert_same(engine.sample(PROMPTS, 1, params), Engine(small, 2, "torch").sample(PROMPTS, 1, params))
