"""The state-space dual recurrence of Mamba-2 (arXiv 2405.21060): oracle, chunked form, single step.

Shapes: x (B, L, H, P), dt (B, L, H) after softplus, A (H,) negative, B and C (B, L, G, N), D (H,), state (B, H, P, N).
Head h reads group h // (H / G). All tensors have one floating dtype. Per head:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

The `decayed_` forms take the logarithm of the decay itself, (B, L, H), and write x unscaled, as Discrete Mamba-2 does
(arXiv 2408.10189): S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def ssd_naive(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one position at a time; the oracle. Returns y (B, L, H, P) and the last state."""
    batch, length, heads, head_dim = x.shape
    if state is None:
        state = x.new_zeros(batch, heads, head_dim, B.shape[-1])
    outputs = []
    for t in range(length):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position: x (B, H, P), dt (B, H), B and C (B, G, N) -> y (B, H, P) and the new state."""
    y, state = decayed_step(dt[..., None] * x, dt * A, B, C, state)
    return y + D[:, None] * x, state


def decayed_step(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position: x (B, H, P), log_decay (B, H), B and C (B, G, N) -> y (B, H, P), without D x, and the new state."""
    repeats = x.shape[1] // B.shape[1]
    B = B.repeat_interleave(repeats, dim=1)
    C = C.repeat_interleave(repeats, dim=1)
    state = torch.exp(log_decay)[..., None, None] * state + x[..., None] * B[:, :, None, :]
    return (state @ C[..., None]).squeeze(-1), state


def decayed_naive(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decayed_step` over L positions, one at a time; the oracle of `decayed_chunked`."""
    batch, length, heads, head_dim = x.shape
    if state is None:
        state = x.new_zeros(batch, heads, head_dim, B.shape[-1])
    outputs = []
    for t in range(length):
        y, state = decayed_step(x[:, t], log_decay[:, t], B[:, t], C[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def decayed_matrix(log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The matrix (B, H, L, L) that `decayed_naive` without a state multiplies x by: C_t . B_s exp(sum of the log decays
    from s + 1 to t) for s <= t, else 0 (arXiv 2405.21060, eq. 3)."""
    heads, groups, length = log_decay.shape[2], B.shape[2], log_decay.shape[1]
    scores = torch.einsum("btgn,bsgn->bgts", C, B).repeat_interleave(heads // groups, dim=1)
    # Summed from each position on: a difference of two long sums would lose the small decays after a large one.
    steps = log_decay.transpose(1, 2)[..., None].expand(-1, -1, -1, length).tril(-1)
    gate = steps.cumsum(2).exp().tril()
    return scores * gate


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same as `ssd_naive`, by matrix products inside chunks and a recurrence over the states between them.

    Any L >= 1. Differentiable once, in every tensor. Work per position and head is about
    chunk * (N + P) + 2 * N * P multiply-adds, so `chunk` near N and P is fastest.
    """
    return _chunked(x, dt, dt * A, B, C, D, state, chunk)


def decayed_chunked(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Same as `decayed_naive`, computed as `ssd_chunked` is."""
    return _chunked(x, None, log_decay, B, C, None, state, chunk)


def _chunked(
    x: Tensor,
    dt: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[-2:]
    if state is None:
        state = x.new_zeros(batch, heads, head_dim, d_state)
    if groups != heads:
        by_head = (batch, length, groups, heads // groups, d_state)
        B = B[:, :, :, None].expand(by_head).flatten(2, 3)
        C = C[:, :, :, None].expand(by_head).flatten(2, 3)
    size = min(chunk, length)
    pad = -length % size
    if pad:
        # x = 0 writes nothing and 0 is no decay, so the last state is that of the last real position.
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        log_decay = F.pad(log_decay, (0, 0, 0, pad))
        dt = None if dt is None else F.pad(dt, (0, 0, 0, pad))
    apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedScan.apply
    y, state = apply(x, dt, log_decay, B, C, D, state, size)
    return y[:, :length], state


class _ChunkedScan(torch.autograd.Function):
    """The scan over whole chunks, G = H. With e the decay from the chunk's start, g the decay between two positions
    and w = g[last] the decay to the chunk's end, v = dt x (x where there is no dt), and S the state before the chunk:

        y = ((C B^T) * g) v + e * (C S^T) + D x        S' = e[last] S + (w * v)^T B

    Intermediates are (Z, Q, .) with Z = batch * chunks * heads matrices of Q positions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor | None,
        log_decay: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, head_dim = x.shape
        chunks = length // size
        b, c, v = _split(B, size), _split(C, size), _split(x, size)
        if dt is not None:
            v *= _split(dt[..., None], size)
        log_decay = _split(log_decay[..., None], size)
        # Summed from each position on: a difference of two long sums would lose the small decays after a large one.
        gate = log_decay.expand(-1, -1, size).tril(-1)
        torch.cumsum(gate, dim=1, out=gate)
        gate.exp_().tril_()
        from_start = log_decay.cumsum(1).exp_()
        to_end = gate[:, -1, :, None]

        kept = from_start[:, -1].view(batch, chunks, heads, 1, 1)
        written = torch.bmm((v * to_end).transpose(1, 2), b).view(batch, chunks, heads, head_dim, -1)
        states = state.new_empty(batch, chunks + 1, *state.shape[1:])
        states[:, 0] = state
        for i in range(chunks):
            torch.addcmul(written[:, i], kept[:, i], states[:, i], out=states[:, i + 1])

        mix = torch.bmm(c, b.transpose(1, 2))
        mix *= gate
        y = torch.bmm(mix, v)
        y.baddbmm_(c * from_start, states[:, :-1].reshape(-1, *state.shape[2:]).transpose(1, 2))
        ctx.save_for_backward(x, dt, D, b, c, v, gate, mix, from_start, states)
        out = _join(y, x.shape)
        return out if D is None else torch.addcmul(out, x, D[:, None]), states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, D, b, c, v, gate, mix, from_start, states = ctx.saved_tensors
        chunks, heads = states.shape[1] - 1, x.shape[2]
        size = x.shape[1] // chunks
        matrix = states.shape[-2:]
        g = _split(dy, size)
        g_start = g * from_start
        to_end = gate[:, -1, :, None]

        read = torch.bmm(g_start.transpose(1, 2), c).view(-1, chunks, heads, *matrix)
        kept = from_start[:, -1].view(-1, chunks, heads, 1, 1)
        dstates = torch.empty_like(states)
        dstates[:, chunks] = dlast
        for i in reversed(range(chunks)):
            torch.addcmul(read[:, i], kept[:, i], dstates[:, i + 1], out=dstates[:, i])
        dafter = dstates[:, 1:].reshape(-1, *matrix)

        dmix = torch.bmm(g, v.transpose(1, 2))
        dpairs = dmix * mix
        dscores = dmix.mul_(gate)
        dc = torch.bmm(g_start, states[:, :-1].reshape(-1, *matrix))
        dread = (dc * c).sum(-1)
        dc.baddbmm_(dscores, b)
        db = torch.bmm(dscores.transpose(1, 2), c).baddbmm_(v * to_end, dafter)
        dv = torch.bmm(b * to_end, dafter.transpose(1, 2))
        dwrite = (dv * v).sum(-1)
        dv.baddbmm_(mix.transpose(1, 2), g)

        # dt A at t acts on every pair (i >= t > j), on what i >= t reads, and on what j < t leaves to the next chunk.
        # Pairs i = j would cancel only up to rounding, which a large A makes visible.
        dpairs.diagonal(dim1=1, dim2=2).zero_()
        # Sums over rows and columns differ by what is left of large numbers: in float32 little would be.
        dread = dread.double() + dpairs.sum(2, dtype=torch.float64) - dpairs.sum(1, dtype=torch.float64)
        dkept = (kept * dstates[:, 1:] * states[:, :-1]).sum((-1, -2)).view(-1, 1)
        dlog = dread.flip(-1).cumsum(-1).flip(-1) + F.pad(dwrite[:, :-1].cumsum(-1), (1, 0)) + dkept
        dlog = _join(dlog.to(x.dtype)[..., None], (*x.shape[:3], 1)).squeeze(-1)
        dv = _join(dv, x.shape)
        by_head = (*x.shape[:3], b.shape[-1])
        db, dc = _join(db, by_head), _join(dc, by_head)
        dx = dv if dt is None else dv * dt[..., None]
        ddt = None if dt is None else (dv * x).sum(-1)
        dD = None if D is None else (dy * x).sum((0, 1, 3))
        if D is not None:
            dx = torch.addcmul(dx, dy, D[:, None])
        return dx, ddt, dlog, db, dc, dD, dstates[:, 0], None


def _split(t: Tensor, size: int) -> Tensor:
    """(B, L, H, K) -> a new (B * L / size * H, size, K)."""
    batch, length, heads, width = t.shape
    out = t.new_empty(batch, length // size, heads, size, width)
    out.copy_(t.reshape(batch, length // size, size, heads, width).transpose(2, 3))
    return out.view(-1, size, width)


def _join(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_split`."""
    batch, length, heads, width = shape
    size = t.shape[1]
    return t.view(batch, length // size, heads, size, width).transpose(2, 3).reshape(shape)
