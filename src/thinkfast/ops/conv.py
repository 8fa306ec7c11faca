"""Causal depthwise convolution: whole sequences and single steps.

Shapes: x (B, L, Ch), weight (Ch, K), bias (Ch,), past (B, Ch, K - 1): the last inputs, oldest first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum_k weight[:, k] * x[t - (K - 1) + k], where inputs before the first come from `past`, else zero.

    Returns y (B, L, Ch) and the new past. No activation. Differentiable once, in every tensor.
    """
    batch, length, channels = x.shape
    before = x.new_zeros(batch, weight.shape[1] - 1, channels) if past is None else past.transpose(1, 2).to(x.dtype)
    padded = torch.cat((before, x), dim=1)
    apply: Callable[..., Tensor] = _CausalConv.apply
    return apply(padded, weight, bias), padded[:, length:].transpose(1, 2)


def causal_conv_step(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """One position: x (B, Ch) -> y (B, Ch) and the new past."""
    window = torch.cat((past.to(x.dtype), x[:, :, None]), dim=2)
    return bias + (window * weight).sum(2), window[:, :, 1:]


class _CausalConv(torch.autograd.Function):
    """One fused multiply-add a tap, forward and backward, over padded (B, K - 1 + L, Ch)."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight.t().contiguous()
        length = padded.shape[1] - len(taps) + 1
        y = torch.addcmul(bias, padded[:, :length], taps[0])
        for k in range(1, len(taps)):
            y.addcmul_(padded[:, k : k + length], taps[k])
        ctx.save_for_backward(padded, taps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, taps = ctx.saved_tensors
        length = dy.shape[1]
        dpadded = torch.zeros_like(padded)
        dtaps = torch.empty_like(taps)
        for k in range(len(taps)):
            dpadded[:, k : k + length].addcmul_(dy, taps[k])
            dtaps[k] = (dy * padded[:, k : k + length]).sum((0, 1))
        return dpadded, dtaps.t(), dy.sum((0, 1))
