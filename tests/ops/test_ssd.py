"""The chunked scan and the single step against the recurrence, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinkfast.ops.ssd import ssd_chunked, ssd_naive, ssd_step

NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def inputs(
    batch: int, length: int, heads: int, groups: int, head_dim: int = 3, d_state: int = 5, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        normal(batch, length, heads, head_dim),
        F.softplus(normal(batch, length, heads)),
        -torch.exp(normal(heads)),
        normal(batch, length, groups, d_state),
        normal(batch, length, groups, d_state),
        normal(heads),
        normal(batch, heads, head_dim, d_state),
    ]


def with_gradients(scan, tensors: list[Tensor], **options: int) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y, state = scan(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    state_weight = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    ((y * weight).sum() + (state * state_weight).sum()).backward()
    named = {"y": y.detach(), "last": state.detach()}
    return named | {f"d{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=False)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].isfinite().all(), name
        scale = max(1.0, float(tensor.abs().max()))
        assert float((got[name].to(tensor.dtype) - tensor).abs().max()) <= tolerance * scale, name


def test_naive_is_the_recurrence_written_out_by_hand() -> None:
    x = torch.tensor([2.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1)
    dt = torch.tensor([0.5, 2.0], dtype=torch.float64).view(1, 2, 1)
    A, D = torch.tensor([-0.25], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
    B = torch.tensor([[1.0, 3.0], [2.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    C = torch.tensor([[1.0, 1.0], [0.0, 4.0]], dtype=torch.float64).view(1, 2, 1, 2)
    y, state = ssd_naive(x, dt, A, B, C, D)
    # S1 = 0.5 * 2 * [1, 3] = [1, 3]; S2 = exp(-0.5) S1 + 2 * -1 * [2, 0]
    decay = 0.6065306597126334
    assert y.flatten().tolist() == pytest.approx([4.0 + 20.0, 4 * 3 * decay - 10.0])
    assert state.flatten().tolist() == pytest.approx([decay - 4.0, 3 * decay])


def test_head_h_reads_group_h_over_heads_per_group() -> None:
    x, dt, A, B, C, D, state = inputs(2, 7, heads=4, groups=2)
    y, last = ssd_naive(x, dt, A, B, C, D, state)
    for head in range(4):
        group = slice(head // 2, head // 2 + 1)
        h = slice(head, head + 1)
        alone, alone_last = ssd_naive(x[:, :, h], dt[:, :, h], A[h], B[:, :, group], C[:, :, group], D[h], state[:, h])
        assert torch.allclose(y[:, :, h], alone, rtol=1e-12)
        assert torch.allclose(last[:, h], alone_last, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 41),
    chunk=st.integers(1, 48),
    shape=st.sampled_from([(4, 4), (4, 2), (3, 1), (1, 1)]),
    with_state=st.booleans(),
    seed=st.integers(0, 999),
)
def test_chunked_equals_naive_with_gradients(batch, length, chunk, shape, with_state, seed) -> None:
    tensors = inputs(batch, length, *shape, seed=seed)
    if not with_state:
        tensors = tensors[:-1]
    want = with_gradients(ssd_naive, tensors)
    assert_same(with_gradients(ssd_chunked, tensors, chunk=chunk), want, 1e-11)
    single = [t.float() for t in tensors]
    assert_same(with_gradients(ssd_chunked, single, chunk=chunk), want, 2e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), length=st.integers(2, 40), chunk=st.integers(1, 20), seed=st.integers(0, 999))
def test_a_sequence_may_be_split_anywhere(data, length, chunk, seed) -> None:
    cut = data.draw(st.integers(1, length - 1))
    x, dt, A, B, C, D, state = inputs(2, length, 4, 2, seed=seed)
    whole, last = ssd_naive(x, dt, A, B, C, D, state)
    first, middle = ssd_chunked(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, state, chunk)
    second, end = ssd_chunked(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, middle, chunk)
    assert torch.allclose(torch.cat((first, second), dim=1), whole, rtol=1e-10, atol=1e-10)
    assert torch.allclose(end, last, rtol=1e-10, atol=1e-10)


def test_steps_continue_a_chunked_prefill() -> None:
    x, dt, A, B, C, D, _ = inputs(3, 23, 4, 4)
    whole, last = ssd_naive(x, dt, A, B, C, D)
    y, state = ssd_chunked(x[:, :11], dt[:, :11], A, B[:, :11], C[:, :11], D, chunk=4)
    assert torch.allclose(y, whole[:, :11], rtol=1e-10, atol=1e-10)
    for t in range(11, 23):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        assert torch.allclose(y, whole[:, t], rtol=1e-10, atol=1e-10)
    assert torch.allclose(state, last, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    tensors = [t.requires_grad_() for t in inputs(1, 5, 2, 1, head_dim=2, d_state=2)]
    assert torch.autograd.gradcheck(lambda *leaves: ssd_chunked(*leaves, chunk=2), tensors)


@pytest.mark.parametrize("decay", [1e-8, 30.0, 1e4, 1e9])
def test_extreme_decays_stay_exact_in_single_precision(decay: float) -> None:
    tensors = inputs(2, 70, 4, 4)
    tensors[2] = -torch.tensor([1e-4, 1.0, decay, decay], dtype=torch.float64)
    want = with_gradients(ssd_naive, tensors)
    got = with_gradients(ssd_chunked, [t.float() for t in tensors], chunk=32)
    assert_same(got, want, 2e-5)


def test_a_reset_does_not_blur_the_slow_decays_after_it() -> None:
    tensors = inputs(1, 64, 2, 2)
    tensors[1] = torch.full_like(tensors[1], 1e-3)
    tensors[1][:, 3] = 1e5
    tensors[0][:, 3] = 0
    tensors[2] = torch.full_like(tensors[2], -1.0)
    want = ssd_naive(*tensors)[0]
    got = ssd_chunked(*(t.float() for t in tensors), chunk=64)[0]
    assert float((got - want).abs().max() / want.abs().max()) < 1e-6


def test_inputs_are_left_alone() -> None:
    tensors = inputs(2, 8, 4, 4)
    copies = [t.clone() for t in tensors]
    y, last = ssd_chunked(*tensors, chunk=4)
    y.add_(1)
    last.add_(1)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


def test_the_gradient_of_a_large_decay_rate_keeps_its_digits() -> None:
    # What a position writes for itself does not decay, and is e^10 times what it leaves to the next.
    tensors = inputs(2, 40, 4, 4)
    tensors[1] = 0.01 + 0.001 * tensors[1]
    tensors[2] = torch.full_like(tensors[2], -1000.0)
    want = with_gradients(ssd_naive, tensors)["dA"]
    got = with_gradients(ssd_chunked, [t.float() for t in tensors], chunk=16)["dA"]
    assert float(((got - want) / want.abs().max()).abs().max()) < 2e-5


def test_the_last_state_may_be_overwritten_before_the_backward() -> None:
    def overwritten(*tensors: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        y, last = ssd_chunked(*tensors, chunk=chunk)
        kept = last.clone()
        last.detach().zero_()
        return y, kept

    tensors = inputs(2, 12, 4, 4)
    assert_same(with_gradients(overwritten, tensors, chunk=4), with_gradients(ssd_naive, tensors), 1e-11)
