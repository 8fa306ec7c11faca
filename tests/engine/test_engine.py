from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thinkfast.engine import engine as engine_module
from thinkfast.engine.engine import Engine
from thinkfast.engine.sampling import Sample, SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.decoder import Decoder

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12] * 45, [1, 2, 3, 4], [20, 21]]
PARAMS = SamplingParams(max_tokens=30, temperature=0.9, seed=7)


def tokens(samples: list[list[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in row] for row in samples]


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_greedy_tokens_are_those_of_the_forward(any_model: Decoder, backend: str) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0)
    drawn = Engine(any_model, slots=4, backend=backend, kv_dtype="float32").sample(PROMPTS, 2, params)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        ids, logprob = list(prompt), 0.0
        ended = False
        while not ended and len(ids) < len(prompt) + 12:
            with torch.no_grad():
                logits = any_model(torch.tensor([ids]))[0, -1]
            ids.append(int(logits.argmax()))
            logprob += float(logits.log_softmax(-1)[ids[-1]])
            ended = ids[-1] in any_model.config.eos_token_ids
        for sample in row:
            assert sample.token_ids == tuple(ids[len(prompt) : len(ids) - ended])
            assert sample.finish_reason == ("stop" if ended else "length")
            assert sample.logprob_sum == pytest.approx(logprob, rel=1e-3, abs=1e-4)


def test_both_backends_draw_the_same(any_model: Decoder) -> None:
    drawn = [Engine(any_model, 5, name, "float32").sample(PROMPTS, 4, PARAMS) for name in ("native", "torch")]
    assert tokens(drawn[0]) == tokens(drawn[1])
    assert len(set(tokens(drawn[0])[0])) == 4, "the samples of a prompt differ"


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_a_sample_depends_on_seed_prompt_and_index_alone(make_model: Callable[..., Decoder], kv_dtype: str) -> None:
    model = make_model("hybrid")
    want = Engine(model, 64, "native", kv_dtype).sample(PROMPTS, 5, PARAMS)
    for slots in (1, 3, 7):
        again = Engine(model, slots, "native", kv_dtype).sample(PROMPTS, 5, PARAMS)
        assert tokens(again) == tokens(want)
        assert [[s.logprob_sum for s in row] for row in again] == [[s.logprob_sum for s in row] for row in want]
    engine = Engine(model, 4, "native", kv_dtype)
    torch.set_num_threads(2)
    try:
        assert tokens(engine.sample(PROMPTS, 5, PARAMS)) == tokens(want)
    finally:
        torch.set_num_threads(1)
    assert tokens(engine.sample([PROMPTS[3], PROMPTS[1]], 2, PARAMS)) == [tokens(want)[3][:2], tokens(want)[1][:2]]
    skip = {(p, j) for p in range(6) for j in range(5)} - {(2, 4), (0, 1)}
    rest = {(p, j): sample.token_ids for p, j, sample in engine.stream(PROMPTS, 5, PARAMS, skip=skip)}
    assert rest == {(2, 4): tokens(want)[2][4], (0, 1): tokens(want)[0][1]}
    other = Engine(model, 64, "native", kv_dtype).sample(
        PROMPTS, 5, SamplingParams(max_tokens=30, temperature=0.9, seed=8)
    )
    assert tokens(other) != tokens(want)


def test_samples_start_in_rounds_and_slots_refill(make_model: Callable[..., Decoder], backend: str) -> None:
    engine = Engine(make_model("pure"), slots=4, backend=backend)
    params = SamplingParams(max_tokens=25, temperature=1.5, seed=1)
    stream = list(engine.stream(PROMPTS, 3, params))
    assert sorted((p, j) for p, j, _ in stream) == [(p, j) for p in range(6) for j in range(3)]
    started = sorted(stream, key=lambda item: item[2].t_start)
    assert [(j, p) for p, j, _ in started] == [(j, p) for j in range(3) for p in range(6)]
    assert [s.t_end for _, _, s in stream] == sorted(s.t_end for _, _, s in stream)
    for moment in {s.t_start for _, _, s in stream}:
        assert sum(s.t_start <= moment < s.t_end for _, _, s in stream) <= 4
    # A free slot is taken in the step after: nobody waits for a batch to end.
    ends = sorted(s.t_end for _, _, s in stream)
    for at, (_, _, sample) in enumerate(started[4:]):
        assert ends[at] <= sample.t_start
        assert sample.t_start < ends[at + 1] or ends[at] == ends[at + 1]


def test_each_prompt_is_prefilled_once_and_forgotten(make_model: Callable[..., Decoder], backend: str) -> None:
    engine = Engine(make_model("attention"), slots=3, backend=backend)
    memory = engine._backend.memory(3, 128)
    engine._memory = memory
    fed: list[tuple[int, ...]] = []
    prefill = memory.prefill

    def counted(prompts: list[tuple[int, ...]], behind: object) -> object:
        fed.extend(prompts)
        return prefill(prompts, behind)

    memory.prefill = counted
    engine.sample(PROMPTS, 4, PARAMS)
    assert engine._memory is memory
    assert sorted(fed) == sorted(tuple(prompt[:-1]) for prompt in PROMPTS)


def test_the_clock_starts_where_it_is_told(make_model: Callable[..., Decoder]) -> None:
    engine = Engine(make_model("pure"), slots=2)
    samples = [s for _, _, s in engine.stream([[1, 2], [3]], 2, PARAMS, clock_start=100.0)]
    assert 100.0 <= min(s.t_start for s in samples) < max(s.t_end for s in samples) < 105.0
    assert all(s.t_start < s.t_end for s in samples)
    assert list(engine.stream([[1, 2]], 2, PARAMS, deadline=99.0, clock_start=100.0)) == []


def test_a_deadline_ends_running_samples(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model = make_model("attention", max_position_embeddings=100_000)
    engine = Engine(model, slots=2, backend=backend)
    params = SamplingParams(max_tokens=5000, temperature=1.0, ignore_eos=True)
    free = tokens(engine.sample([[1, 2]], 1, SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)))[0][0]
    now = iter(range(10**6))  # thousandths of a second, one each time anyone looks
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: next(now) / 1000))
    streamed = list(engine.stream([[1, 2], [3], [4]], 2, params, deadline=0.05))
    assert [(p, j, s.finish_reason) for p, j, s in streamed] == [(0, 0, "deadline"), (1, 0, "deadline")]
    assert all(0.05 <= s.t_end < 0.06 and 0 < len(s.token_ids) < 5000 for _, _, s in streamed)
    shared = min(20, len(streamed[0][2].token_ids))
    assert streamed[0][2].token_ids[:shared] == free[:shared]
    table = engine.sample([[1, 2], [3], [4]], 2, params, deadline=0.05)
    assert [[s.finish_reason for s in row] for row in table] == [["deadline"] * 2] * 3
    assert [len(s.token_ids) > 0 for row in table for s in row] == [True, False, True, False, False, False]


def test_stop_sequences_and_end_of_sequence(make_model: Callable[..., Decoder], backend: str) -> None:
    engine = Engine(make_model("hybrid"), slots=3, backend=backend, kv_dtype="float32")
    free = SamplingParams(max_tokens=40, temperature=1.2, seed=3, ignore_eos=True)
    whole = tokens(engine.sample(PROMPTS, 3, free))
    assert all(len(ids) == 40 for row in whole for ids in row)
    assert any(3 in ids for row in whole for ids in row)
    stop = (whole[0][0][10:12], (999,), (3, 3, 3, 3, 3))
    cut = engine.sample(PROMPTS, 3, SamplingParams(max_tokens=40, temperature=1.2, seed=3, stop=stop))
    for row, samples in zip(whole, cut, strict=True):
        for ids, sample in zip(row, samples, strict=True):
            end, reason = 40, "length"
            for at in range(40):
                if ids[at] == 3:
                    end, reason = at, "stop"
                    break
                if any(ids[: at + 1][-len(s) :] == s for s in stop):
                    end, reason = at + 1, "stop"
                    break
            assert (sample.token_ids, sample.finish_reason) == (ids[:end], reason)
    assert len(cut[0][0].token_ids) <= 12


def test_log_probabilities_on_request(make_model: Callable[..., Decoder], backend: str) -> None:
    model = make_model("hybrid")
    engine = Engine(model, slots=3, backend=backend, kv_dtype="float32")
    plain = engine.sample(PROMPTS, 2, PARAMS)
    asked = engine.sample(PROMPTS, 2, replace(PARAMS, logprobs=True))
    assert tokens(asked) == tokens(plain)
    for prompt, row, without in zip(PROMPTS, asked, plain, strict=True):
        for sample, bare in zip(row, without, strict=True):
            assert bare.logprobs == ()
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *sample.token_ids]]))[0].log_softmax(-1)
            want = [float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(sample.token_ids)]
            assert sample.logprobs == pytest.approx(want, rel=1e-3, abs=1e-4)
            ended = float(logits[-1, 3]) if sample.finish_reason == "stop" else 0.0
            assert sum(sample.logprobs) + ended == pytest.approx(sample.logprob_sum, rel=1e-3, abs=1e-3)


def test_an_abandoned_stream_leaves_the_engine_whole(make_model: Callable[..., Decoder], backend: str) -> None:
    engine = Engine(make_model("hybrid"), slots=2, backend=backend)
    want = tokens(engine.sample(PROMPTS, 2, PARAMS))
    stream = engine.stream(PROMPTS, 2, PARAMS)
    next(stream)
    other = tokens(engine.sample(PROMPTS[:2], 2, PARAMS))  # at the same time
    assert other == want[:2]
    stream.close()
    assert tokens(engine.sample(PROMPTS, 2, PARAMS)) == want


def test_no_prompts_no_samples(make_model: Callable[..., Decoder]) -> None:
    engine = Engine(make_model("pure"))
    assert engine.sample([], 3, PARAMS) == []
    assert list(engine.stream([[1]], 1, PARAMS, skip={(0, 0)})) == []


def test_a_short_refill_after_a_long_prompt_is_clean(make_model: Callable[..., Decoder], backend: str) -> None:
    """A slot's old keys, values and states must not be seen by what follows in it."""
    model = make_model("hybrid")
    prompts = [list(np.random.default_rng(0).integers(0, 50, 90)), [5], [6, 7]]
    drawn = Engine(model, slots=1, backend=backend).sample(prompts, 2, PARAMS)
    for prompt, row in zip(prompts, drawn, strict=True):
        assert tokens([row]) == tokens(Engine(model, slots=1, backend=backend).sample([prompt], 2, PARAMS))


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1, 50]], 1, "prompt 0 holds token id 50, expected 0 to 49"),
        ([[-1]], 1, "prompt 0 holds token id -1"),
        ([[1] * 230], 1, "prompt 0 has 230 tokens and max_tokens is 30: .* max_position_embeddings 256"),
        ([[1]], 0, "n is 0, expected 1 or more"),
    ],
)
def test_bad_prompts_are_refused_at_the_call(
    make_model: Callable[..., Decoder], prompts: list[list[int]], n: int, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        Engine(make_model("pure")).stream(prompts, n, PARAMS)


def test_an_engine_needs_a_slot(make_model: Callable[..., Decoder]) -> None:
    with pytest.raises(BadInput, match="slots is 0, expected 1 or more"):
        Engine(make_model("pure"), slots=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_directory_that_changes_under_an_engine_changes_nothing(
    make_model: Callable[..., Decoder], tmp_path: Path, backend: str
) -> None:
    """The weights are held, not mapped: neither other bytes nor a shorter file reach a running engine."""
    save_model(make_model("hybrid"), tmp_path / "model")
    model = load_model(tmp_path / "model")
    engine, params = Engine(model, 2, backend), SamplingParams(max_tokens=12, temperature=1.1, ignore_eos=True)
    stream = engine.stream([[1, 2, 3]], 4, params)
    first = next(stream)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"\0" * 100)
    (tmp_path / "model" / "config.json").unlink()
    drawn = sorted([first, *stream], key=lambda result: result[1])
    whole = Engine(make_model("hybrid"), 2, backend).sample([[1, 2, 3]], 4, params)[0]
    assert [sample.token_ids for _, _, sample in drawn] == [sample.token_ids for sample in whole]
