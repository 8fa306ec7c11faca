"""The chunked selective scan and the single step against the recurrence, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thinkfast.ops.scan import linear_scan, selective_chunked, selective_naive, selective_step


def inputs(batch: int, length: int, groups: int, width: int, size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = groups * width
    x, dt = normal(batch, length, channels), F.softplus(normal(batch, length, channels))
    A, B, C = (
        -torch.exp(normal(channels, size)),
        normal(batch, length, groups, size),
        normal(batch, length, groups, size),
    )
    return [x, dt, A, B, C, normal(channels), normal(batch, channels, size)]


def with_gradients(scan, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    y, state = scan(*leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, state)]
    ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
    return [y.detach(), state.detach(), *(leaf.grad for leaf in leaves)]


def test_naive_is_the_recurrence_written_out_by_hand() -> None:
    x, dt = torch.tensor([[[2.0, 1.0], [-1.0, 3.0]]]), torch.tensor([[[0.5, 1.0], [2.0, 1.0]]])
    A, D = torch.tensor([[-0.2], [-0.4]]), torch.tensor([10.0, 0.0])
    B, C = torch.tensor([[[[3.0]], [[2.0]]]]), torch.tensor([[[[1.0]], [[4.0]]]])
    y, state = selective_naive(x, dt, A, B, C, D)
    first = torch.tensor([0.5 * 2 * 3, 1 * 1 * 3])
    second = torch.exp(torch.tensor([2 * -0.2, 1 * -0.4])) * first + torch.tensor([2 * -1 * 2.0, 1 * 3 * 2.0])
    assert torch.allclose(y[0], torch.stack((first + torch.tensor([20.0, 0]), 4 * second + torch.tensor([-10.0, 0]))))
    assert torch.allclose(state[0, :, 0], second)


@pytest.mark.parametrize(
    ("length", "groups", "width", "size"), [(1, 1, 1, 1), (2, 2, 3, 4), (17, 3, 2, 5), (50, 1, 4, 3)]
)
def test_chunked_equals_naive_in_values_and_gradients(length: int, groups: int, width: int, size: int) -> None:
    tensors = inputs(2, length, groups, width, size)
    for got, want in zip(
        with_gradients(selective_chunked, tensors), with_gradients(selective_naive, tensors), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)


def test_decays_of_zero_and_one_stay_exact_in_float32() -> None:
    tensors = inputs(1, 40, 2, 2, 3)
    tensors[1][:, 10:20] = 200.0
    tensors[1][:, 20:] = 1e-12
    exact = with_gradients(selective_naive, tensors)
    for got, want in zip(with_gradients(selective_chunked, [t.float() for t in tensors]), exact, strict=True):
        assert got.isfinite().all()
        assert (got - want).abs().max() <= 1e-4 * max(1.0, float(want.abs().max()))


def test_steps_go_on_where_a_sequence_ended() -> None:
    x, dt, A, B, C, D, state = inputs(2, 9, 2, 3, 4)
    want, last = selective_naive(x, dt, A, B, C, D, state)
    _, state = selective_chunked(x[:, :6], dt[:, :6], A, B[:, :6], C[:, :6], D, state)
    for t in range(6, 9):
        y, state = selective_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        assert torch.allclose(y, want[:, t])
    assert torch.allclose(state, last)


def test_linear_scan_gradient_in_the_first_state() -> None:
    a, b = torch.rand(1, 7, 2, dtype=torch.float64), torch.randn(1, 7, 2, dtype=torch.float64)
    first = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    linear_scan(a, b, first)[:, -1].sum().backward()
    assert torch.allclose(first.grad, a.prod(1))
