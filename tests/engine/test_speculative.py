"""Speculative decoding against the model alone: the same distribution, and greedily the same tokens."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from thinkfast.engine.engine import Engine
from thinkfast.engine.live import LiveEngine
from thinkfast.engine.request import Closed, Drawn, Event, Request
from thinkfast.engine.sampling import SamplingParams, probabilities
from thinkfast.engine.speculative import REFEED, SpeculativeBackend, judge
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12] * 45]
PAIRS = [("attention", "pure"), ("hybrid", "pure"), ("pure", "attention"), ("hybrid", "hybrid")]


def tokens(samples: list[list[object]]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in row] for row in samples]


def near(make_model: Callable[..., Decoder], name: str, noise: float) -> Decoder:
    """A draft that often agrees: the model with noise on its weights."""
    model = make_model(name)
    torch.manual_seed(9)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(noise * value.std() * torch.randn_like(value) if value.numel() > 1 else 0)
    return model


@pytest.mark.parametrize(("name", "other"), PAIRS)
@pytest.mark.parametrize("slots", [1, 3])
def test_greedy_tokens_are_those_of_the_model(
    make_model: Callable[..., Decoder], name: str, other: str, slots: int
) -> None:
    """With end of sequence, with a draft that is mostly wrong and one that is mostly right."""
    model = make_model(name)
    params = SamplingParams(max_tokens=24, temperature=0.0)
    want = Engine(model, 4, "torch").sample(PROMPTS, 1, params)
    for draft in (make_model(other, seed=1), near(make_model, name, 0.05)):
        got = Engine(model, slots, draft=draft).sample(PROMPTS, 1, params)
        assert tokens(got) == tokens(want)
        for row, alone in zip(got, want, strict=True):
            assert row[0].finish_reason == alone[0].finish_reason
            assert row[0].logprob_sum == pytest.approx(alone[0].logprob_sum, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["attention", "hybrid", "pure"])
def test_a_draft_that_is_the_model_changes_no_token(make_model: Callable[..., Decoder], name: str) -> None:
    """Everything is taken, and every place has its own random number: what the model draws alone."""
    params = SamplingParams(max_tokens=30, temperature=0.9, top_k=20, seed=4)
    want = Engine(make_model(name), 3, "torch").sample(PROMPTS, 2, params)
    assert tokens(Engine(make_model(name), 3, draft=make_model(name)).sample(PROMPTS, 2, params)) == tokens(want)


@pytest.mark.parametrize(("name", "other"), PAIRS[:3])
def test_samples_have_the_distribution_of_the_model(make_model: Callable[..., Decoder], name: str, other: str) -> None:
    """Every sequence of three tokens of a vocabulary of four, by chi-square, cut by top_k and tempered."""
    model, draft = (make_model(kind, vocab_size=4, seed=seed) for kind, seed in ((name, 0), (other, 1)))
    params = SamplingParams(max_tokens=3, temperature=1.3, top_k=3, seed=12, ignore_eos=True)
    drawn = Engine(model, 40, draft=draft).sample([[1, 2]], 1000, params)[0]
    expected, guessed = (exact(each, [1, 2], params) for each in (model, draft))
    counts = dict.fromkeys(expected, 0)
    for sample in drawn:
        counts[sample.token_ids] += 1
    assert not any(counts[ids] for ids, share in expected.items() if share == 0)
    assert chi_square(counts, expected) < 2.08, "the 99.9 % quantile for 26 degrees of freedom"
    assert chi_square(counts, guessed) > 3, "the draft's own distribution is another one"


def exact(model: Decoder, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of three tokens."""
    every = list(product(range(model.config.vocab_size), repeat=3))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(ids) for ids in every]))[:, len(prompt) - 1 : -1].numpy()
    shares = probabilities(logits.reshape(-1, logits.shape[-1]), params).reshape(logits.shape)
    return {
        ids: float(np.prod([row[at, token] for at, token in enumerate(ids)]))
        for ids, row in zip(every, shares, strict=True)
    }


def chi_square(counts: dict[tuple[int, ...], int], shares: dict[tuple[int, ...], float]) -> float:
    """Per degree of freedom; sequences that are expected less than five times together."""
    total = sum(counts.values())
    common = [ids for ids, share in shares.items() if share * total >= 5]
    seen = [counts[ids] for ids in common]
    wanted = [shares[ids] * total for ids in common]
    seen.append(total - sum(seen))
    wanted.append(max(total - sum(wanted), 1e-9))
    if wanted[-1] < 5:
        seen[-2:], wanted[-2:] = [sum(seen[-2:])], [sum(wanted[-2:])]
    return sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True)) / (len(seen) - 1)


def test_tokens_depend_on_seed_prompt_and_index_alone(make_model: Callable[..., Decoder]) -> None:
    model, draft = make_model("hybrid"), near(make_model, "hybrid", 0.1)
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=7)
    want = tokens(Engine(model, 8, draft=draft).sample(PROMPTS, 3, params))
    assert len(set(want[0])) == 3
    for slots in (1, 3):
        assert tokens(Engine(model, slots, draft=draft).sample(PROMPTS, 3, params)) == want


def test_states_that_lag_move_on(make_model: Callable[..., Decoder]) -> None:
    """Guesses that are never right: the kept state must follow, and no pass feeds more than a bounded piece."""
    model, draft = make_model("pure"), make_model("pure", seed=1)
    backend = SpeculativeBackend(model, draft)
    engine = Engine(model, 1, draft=draft)
    memory = backend.memory(1, 128)
    engine._take_memory = lambda slots, capacity: memory
    widths: list[int] = []
    run = memory._model.run

    def watched(pieces: dict[int, list[int]], exact: bool) -> object:
        widths.extend(len(piece) for piece in pieces.values())
        return run(pieces, exact)

    memory._model.run = watched
    params = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True)
    got = engine.sample([[1, 2]], 1, params)[0][0].token_ids
    assert got == Engine(model, 1, "torch").sample([[1, 2]], 1, params)[0][0].token_ids
    assert REFEED < max(widths) <= REFEED + 2 * backend.ahead


def test_a_live_engine_speculates_too(make_model: Callable[..., Decoder]) -> None:
    model, draft = make_model("hybrid"), near(make_model, "hybrid", 0.1)
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=2)
    want = Engine(model, 3, draft=draft).sample([[1, 2, 3]], 4, params)[0]
    live = LiveEngine(Engine(model, 3, draft=draft), 128)
    events: list[Event] = []
    try:
        import threading

        done = threading.Event()

        def told(event: Event) -> None:
            events.append(event)
            if isinstance(event, Closed):
                done.set()

        live.submit(Request((1, 2, 3), params, 4), told)
        assert done.wait(60)
    finally:
        live.close()
    drawn = {event.index: event.sample.token_ids for event in events if isinstance(event, Drawn)}
    assert drawn == {index: sample.token_ids for index, sample in enumerate(want)}


def test_a_sample_without_finite_logits_fails_alone(make_model: Callable[..., Decoder]) -> None:
    model, draft = make_model("hybrid"), make_model("pure", seed=1)
    with torch.no_grad():
        for broken in (model, draft):
            broken.lm_head = torch.nn.Linear(32, 50, bias=False)
        model.embed_tokens.weight[7] = float("nan")
        draft.embed_tokens.weight[9] = float("nan")
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    broken, sound = Engine(model, 2, draft=draft).sample([[1, 7, 2], [1, 9, 2]], 1, params)
    assert (broken[0].finish_reason, broken[0].token_ids) == ("error", ())
    alone = Engine(model, 1, "torch").sample([[1, 9, 2]], 1, params)[0][0]
    assert (sound[0].finish_reason, sound[0].token_ids) == ("length", alone.token_ids)


def test_equal_distributions_that_refuse_a_guess_fall_back_on_the_model() -> None:
    """Rounding can leave nothing of p - q; a uniform token would be wrong."""
    logits = np.array([[0.0, -np.inf, -np.inf]] * 2, np.float32)
    params = SamplingParams()
    keys, counts = np.zeros(2, np.uint64), np.arange(2)
    shares = np.array([[1.0 + 1e-9, 0.0, 0.0]])
    for seed in range(50):
        assert judge(logits, shares, [1], keys + np.uint64(seed), counts, params)[0] == 0


def test_drafts_that_do_not_fit_are_refused(make_model: Callable[..., Decoder]) -> None:
    model = make_model("hybrid")
    with pytest.raises(BadInput, match="draft has a vocabulary of 49 tokens, expected the model's 50"):
        Engine(model, draft=make_model("pure", vocab_size=49))
    with pytest.raises(BadInput, match="backend is 'native', expected 'auto' or 'torch' with a draft"):
        Engine(model, backend="native", draft=make_model("pure"))
