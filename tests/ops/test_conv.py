"""The causal convolution against a loop over positions and taps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinkfast.ops.conv import causal_conv, causal_conv_step


def loop(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None) -> Tensor:
    batch, length, channels = x.shape
    taps = weight.shape[1]
    y = torch.zeros_like(x)
    for b in range(batch):
        for t in range(length):
            for c in range(channels):
                total = bias[c]
                for back in range(taps):
                    if t - back >= 0:
                        total = total + weight[c, taps - 1 - back] * x[b, t - back, c]
                    elif past is not None:
                        total = total + weight[c, taps - 1 - back] * past[b, c, taps - 1 + t - back]
                y[b, t, c] = total
    return y


def inputs(length: int, taps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, length, 3), (3, taps), (3,), (2, 3, taps - 1))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("with_past", [False, True])
def test_equals_the_loop(length: int, taps: int, with_past: bool) -> None:
    x, weight, bias, past = inputs(length, taps)
    before = past if with_past else None
    y, after = causal_conv(x, weight, bias, before)
    assert torch.allclose(y, loop(x, weight, bias, before), rtol=1e-12, atol=1e-12)
    history = torch.cat((past if with_past else torch.zeros_like(past), x.transpose(1, 2)), dim=2)
    assert torch.equal(after, history[:, :, length:])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), length=st.integers(2, 12), taps=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_sequence_may_be_split_anywhere_and_stepped(data, length, taps, seed) -> None:
    cut = data.draw(st.integers(1, length - 1))
    x, weight, bias, past = inputs(length, taps, seed)
    whole, end = causal_conv(x, weight, bias, past)
    first, middle = causal_conv(x[:, :cut], weight, bias, past)
    second, last = causal_conv(x[:, cut:], weight, bias, middle)
    assert torch.allclose(torch.cat((first, second), dim=1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(last, end)
    for t in range(cut, length):
        y, middle = causal_conv_step(x[:, t], weight, bias, middle)
        assert torch.allclose(y, whole[:, t], rtol=1e-12, atol=1e-12)
    assert torch.equal(middle, end)


def test_gradients() -> None:
    leaves = [t.requires_grad_() for t in inputs(5, 4)]
    assert torch.autograd.gradcheck(causal_conv, leaves)
