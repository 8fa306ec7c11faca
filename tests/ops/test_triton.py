"""Every Triton kernel against its definition in float64: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: the extra dev, with `make test`, on Linux")

from thinkfast.engine.sampling import SamplingParams
from thinkfast.engine.sampling import draw as oracle
from thinkfast.ops.triton.attention import SHARED_ROWS, share
from thinkfast.ops.triton.check import check_attention, check_pointwise, check_step
from thinkfast.ops.triton.mixer import softplus
from thinkfast.ops.triton.sampling import Streams, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16
EXACT, ROUNDED = 2e-6, 2e-2


@pytest.mark.parametrize(("rows", "size", "groups"), [(1, 1, 1), (3, 12, 3), (2, 1500, 4)])
def test_norms_and_activations(rows: int, size: int, groups: int) -> None:
    for name, wrong in check_pointwise(rows, size, groups, DEVICE).items():
        assert wrong < EXACT, name
    for name, wrong in check_pointwise(rows, size, groups, DEVICE, HALF).items():
        assert wrong < ROUNDED, name


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "d_state", "taps", "ring", "steps"),
    [
        (2, 2, 8, 16, 4, 4, 8),  # the norm of a group in the same launch; the ring is written back twice
        (2, 1, 5, 7, 3, 1, 2),  # without a ring, the state is written at every step
        (3, 1, 12, 3, 1, 2, 3),  # one tap has no past
        (4, 2, 4, 4, 2, 8, 3),  # never written back
    ],
)
def test_a_mamba_step_is_the_recurrence(heads, groups, head_dim, d_state, taps, ring, steps) -> None:
    sizes = (heads, groups, head_dim, d_state, taps, ring, steps)
    assert check_step(2, *sizes, device=DEVICE) < EXACT


def test_a_mamba_step_with_a_state_of_two_bytes() -> None:
    assert check_step(1, 1, 1, 8, 8, 4, 4, 8, DEVICE, HALF, HALF) < ROUNDED


def test_softplus_keeps_its_digits_where_it_is_small() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(source, target, SIZE: tl.constexpr) -> None:
        i = tl.arange(0, SIZE)
        tl.store(target + i, softplus(tl.load(source + i)))

    x = torch.linspace(-40, 40, 64, device=DEVICE)
    got = torch.empty_like(x)
    kernel[(1,)](x, got, 64)
    want = torch.nn.functional.softplus(x.double())
    assert float(((got.double() - want) / want).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("prompts", "prefixes", "own", "heads", "kv_heads", "head_dim", "splits"),
    [
        ([3, 0, 70], [0, 1, 2, 0], [0, 5, 2, 3], 4, 2, 8, 1),  # three prompts, one without tokens
        ([67], [0] * 3, [65, 2, 0], 6, 2, 24, 2),  # more than one piece of the inner loop; three queries a head
        ([5], [0] * (SHARED_ROWS + 1), [1] * (SHARED_ROWS + 1), 1, 1, 4, 1),  # more rows than a block holds
    ],
)
def test_attention_over_a_shared_prompt_and_own_tokens(
    prompts, prefixes, own, heads, kv_heads, head_dim, splits
) -> None:
    shape = (prompts, prefixes, own, heads, kv_heads, head_dim, splits, DEVICE)
    assert check_attention(*shape) < EXACT


def test_attention_in_two_bytes() -> None:
    assert check_attention([9], [0, 0], [1, 3], 2, 1, 16, 2, DEVICE, HALF, HALF) < ROUNDED


def test_rows_are_shared_out_by_prompt() -> None:
    prefixes = np.array([1] * (SHARED_ROWS + 2) + [-1, 0, 1])
    order, first, count, which = share(prefixes)
    seen = []
    for begin, rows, prompt in zip(first, count, which, strict=True):
        assert rows <= SHARED_ROWS
        assert (prefixes[order[begin : begin + rows]] == prompt).all()
        seen += order[begin : begin + rows].tolist()
    assert sorted(seen) == list(range(len(prefixes)))


TEMPERATURES, TOP_K, TOP_P = [1.0, 0.0, 0.5, 2.0, 1.0, 0.01], [0, 3, 5, 1, 0, 700], [1.0, 0.5, 0.9, 0.5, 0.3, 0.99]


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "broken"])
@pytest.mark.parametrize("vocab", [50, 2500])
def test_tokens_are_those_of_the_sampler_in_numpy(vocab: int, broken: bool, cut: bool) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(6, vocab)).astype(np.float32) * 3
    if broken:
        logits[0, 3], logits[2, 5], logits[4, 7] = np.nan, np.inf, logits[4].max()
        logits[1], logits[3, :-2] = -np.inf, -np.inf
    keys, counts = rng.integers(0, 2**64, 6, dtype=np.uint64), rng.integers(0, 1000, 6)
    top_k, top_p = (TOP_K, TOP_P) if cut else ([0] * 6, [1.0] * 6)
    streams = Streams(
        torch.from_numpy(keys.view(np.int64)).to(DEVICE),
        torch.from_numpy(counts).to(DEVICE),
        torch.tensor(TEMPERATURES, dtype=torch.float64, device=DEVICE),
        torch.tensor(top_k, device=DEVICE),
        torch.tensor(top_p, dtype=torch.float64, device=DEVICE),
    )
    tokens, logprobs = draw(torch.from_numpy(logits).to(DEVICE), streams, cut)
    for row in range(6):
        params = SamplingParams(temperature=TEMPERATURES[row], top_k=top_k[row], top_p=top_p[row])
        at = slice(row, row + 1)
        with np.errstate(invalid="ignore"):
            token, logprob = oracle(logits[at], keys[at], counts[at], params)
        assert tokens[row] == token[0]
        assert float(logprobs[row]) == pytest.approx(logprob[0], abs=1e-5, nan_ok=True)
