"""The selective scan of Mamba-1 (arXiv 2312.00752): oracle, chunked form, single step.

Shapes: x and dt (B, L, D) after softplus, A (D, N) negative, B and C (B, L, G, N), D (D,), state (B, D, N).
Channel d reads group d // (D / G). All tensors have one floating dtype. Per channel:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t . C_t + D x_t
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def selective_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One position: x and dt (B, D), B and C (B, G, N) -> y (B, D) and the new state."""
    width = x.shape[-1] // B.shape[1]
    B, C = B.repeat_interleave(width, dim=1), C.repeat_interleave(width, dim=1)
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
    return (state * C).sum(-1) + D * x, state


def selective_naive(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one position at a time; the oracle. Returns y (B, L, D) and the last state."""
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[1]):
        y, state = selective_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def selective_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same as `selective_naive`, in about 2 sqrt(L) steps over all chunks at once. Differentiable once.

    Holds a few tensors of L * D * N numbers.
    """
    batch, length, channels = x.shape
    groups, size = B.shape[2:]
    by_group = (batch, length, groups, channels // groups)
    decay = torch.exp(dt.view(by_group)[..., None] * A.view(groups, -1, size))
    written = (dt * x).view(by_group)[..., None] * B[:, :, :, None]
    first = x.new_zeros(batch, *A.shape) if state is None else state
    states = linear_scan(decay, written, first.view(batch, groups, -1, size))
    y = torch.einsum("blgdn,blgn->blgd", states, C).reshape(x.shape)
    return y + D * x, states[:, -1].reshape(batch, *A.shape)


def linear_scan(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t for a and b (B, L, ...), with h before the start = `first` (B, ...). Returns h (B, L,
    ...).

    Nothing is divided by a decay, so that decays near 0 do no harm. Differentiable once, in all three.
    """
    apply: Callable[..., Tensor] = _LinearScan.apply
    return apply(a, b, first)


class _LinearScan(torch.autograd.Function):
    """Backwards it is the same recurrence in the other direction: g_t = dh_t + a_{t+1} g_{t+1}."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, first: Tensor) -> Tensor:
        states = _scan(a, b, first)
        ctx.save_for_backward(a, first, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, first, states = ctx.saved_tensors
        following = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), 1)
        gradient = _scan(following.flip(1), upstream.flip(1), torch.zeros_like(first)).flip(1)
        before = torch.cat((first[:, None], states[:, :-1]), 1)
        return gradient * before, gradient, a[:, 0] * gradient[:, 0]


def _scan(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """Every chunk from zero, all chunks at once; then the states between chunks; then what they add."""
    batch, length, *rest = b.shape
    size = max(1, math.isqrt(length))
    pad = -length % size
    if pad:
        widths = (0, 0) * len(rest) + (0, pad)
        a, b = F.pad(a, widths, value=1.0), F.pad(b, widths)
    shape = (batch, -1, size, *rest)
    decay, states = a.reshape(shape).clone(), b.reshape(shape).clone()
    for t in range(1, size):
        states[:, :, t].addcmul_(decay[:, :, t], states[:, :, t - 1])
        decay[:, :, t] *= decay[:, :, t - 1]
    before = torch.empty_like(states[:, :, 0])
    running = first
    for z in range(states.shape[1]):
        before[:, z] = running
        running = torch.addcmul(states[:, z, -1], decay[:, z, -1], running)
    states.addcmul_(decay, before[:, :, None])
    return states.view(batch, -1, *rest)[:, :length]
