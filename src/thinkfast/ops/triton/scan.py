"""The chunked state-space scan in two kernels: `thinkfast.ops.ssd.ssd_chunked` for GPUs, forward and backward.

A program takes one sequence and head (and a slice of its channels) from chunk to chunk, the state in its registers, so
that states go to memory only where the backward pass will want them: one before each chunk. The backward pass goes from
the last chunk to the first with the state's gradient in registers and computes everything inside a chunk anew.

Decays between two positions are differences of sums in float64: in float32 small decays would be lost after large ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64
MAX_WIDTH = 128
"""Channels of a head, and of a state, that a program holds."""


def ssd_fused(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    chunk: int = CHUNK,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Same as `thinkfast.ops.ssd.ssd_naive`, in float32; differentiable once, in every tensor.

    x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N), D (H,), state (B, H, P, N) -> y and the last state.
    chunk: positions a step, at most 64 (32 for P or N above 64), rounded up to a power of two. precision: of matrix
    products, "ieee", "tf32x3" or "tf32". Raises ValueError for P or N above 128.
    """
    if x.shape[3] > MAX_WIDTH or B.shape[3] > MAX_WIDTH:
        raise ValueError(f"head_dim is {x.shape[3]} and d_state {B.shape[3]}, expected at most {MAX_WIDTH} of each")
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    # The backward pass of longer ones would not fit the 227 KiB of shared memory of a multiprocessor.
    longest = CHUNK if max(x.shape[3], B.shape[3]) <= MAX_WIDTH // 2 else CHUNK // 2
    size = max(triton.next_power_of_2(min(chunk, longest, x.shape[1])), 16)
    apply: Callable[..., tuple[Tensor, Tensor]] = _Scan.apply
    return apply(*(t.contiguous() for t in (x, dt, A, B, C, D, state)), size, precision)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor,
        size: int,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, head_dim = x.shape
        groups, d_state = B.shape[2:]
        chunks = triton.cdiv(length, size)
        keep = any(ctx.needs_input_grad)
        states = state.new_empty(batch, heads, chunks if keep else 0, head_dim, d_state)
        y, last = torch.empty_like(x), torch.empty_like(state)
        block_n = max(triton.next_power_of_2(d_state), 16)
        # Slices of a head's channels are independent here: more programs for the few heads of one prompt.
        block_p = max(min(triton.next_power_of_2(head_dim), 32), 16)
        grid = (batch, heads, triton.cdiv(head_dim, block_p))
        _scan[grid](
            x, dt, A, B, C, D, state, y, last, states,
            length, chunks, heads, groups, head_dim, d_state,
            size, block_p, block_n, keep, precision, num_warps=4, num_stages=1,
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, D, states)
        ctx.size, ctx.precision = size, precision
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, states = ctx.saved_tensors
        batch, length, heads, head_dim = x.shape
        groups, d_state = B.shape[2:]
        block_p, block_n = (max(triton.next_power_of_2(width), 16) for width in (head_dim, d_state))
        dx, dstate = torch.empty_like(x), torch.empty_like(dlast)
        by_head = x.new_empty(2, batch, length, heads, d_state)
        # The gradient of dt, and of dt A alone.
        by_time = x.new_empty(2, batch, length, heads)
        _scan_back[(batch, heads)](
            x, dt, A, B, C, D, states, dy.contiguous(), dlast.contiguous(), dx, by_time, by_head, dstate,
            length, states.shape[2], heads, groups, head_dim, d_state, batch * length * heads,
            ctx.size, block_p, block_n, ctx.precision, num_warps=8, num_stages=1,
        )  # fmt: skip
        db, dc = by_head.view(2, batch, length, groups, heads // groups, d_state).sum(4)
        dA = (by_time[1] * dt).sum((0, 1))
        dD = (dy * x).sum((0, 1, 3))
        return dx, by_time[0], dA, db, dc, dD, dstate, None, None


@triton.jit
def _decays(dt, A, base, t, inside, H, Q: tl.constexpr):
    """dt (Q,), the decay from the chunk's start to each position, to its end from there, and between any two."""
    step = tl.load(dt + base + t.to(tl.int64) * H, mask=inside, other=0.0)
    log = (step * A).to(tl.float64)
    reached = tl.cumsum(log, 0)
    whole = tl.sum(log, 0)
    i = tl.arange(0, Q)
    apart = tl.where(i[:, None] >= i[None, :], reached[:, None] - reached[None, :], float("-inf"))
    return (
        step,
        tl.exp(reached.to(tl.float32)),
        tl.exp((whole - reached).to(tl.float32)),
        tl.exp(apart.to(tl.float32)),
        tl.exp(whole.to(tl.float32)),
    )


@triton.jit
def _scan(
    x, dt, A, B, C, D, first, y, last, states, L, chunks, H, G,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_p, in_n = p < P, n < N
    decay, skip = tl.load(A + head), tl.load(D + head)
    cell = p[:, None] * N + n[None, :]
    in_cell = in_p[:, None] & in_n[None, :]
    at_state = (sequence * H + head) * P * N
    state = tl.load(first + at_state + cell, mask=in_cell, other=0.0)
    for chunk in range(chunks):
        if KEEP:
            tl.store(states + ((sequence * H + head) * chunks + chunk) * P * N + cell, state, mask=in_cell)
        t = chunk * Q + i
        inside = t < L
        step, from_start, to_end, between, kept = _decays(dt, decay, sequence * L * H + head, t, inside, H, Q)
        position = sequence * L + t
        at_x = (position * H + head)[:, None] * P + p[None, :]
        at_b = (position * G + head // (H // G))[:, None] * N + n[None, :]
        in_x, in_b = inside[:, None] & in_p[None, :], inside[:, None] & in_n[None, :]
        xs = tl.load(x + at_x, mask=in_x, other=0.0)
        b = tl.load(B + at_b, mask=in_b, other=0.0)
        c = tl.load(C + at_b, mask=in_b, other=0.0)
        v = step[:, None] * xs
        mix = tl.dot(c, tl.trans(b), input_precision=PRECISION) * between
        out = tl.dot(mix, v, input_precision=PRECISION)
        out += tl.dot(c * from_start[:, None], tl.trans(state), input_precision=PRECISION)
        tl.store(y + at_x, out + skip * xs, mask=in_x)
        state = kept * state + tl.dot(tl.trans(v * to_end[:, None]), b, input_precision=PRECISION)
    tl.store(last + at_state + cell, state, mask=in_cell)


@triton.jit
def _scan_back(
    x, dt, A, B, C, D, states, dy, dlast, dx, by_time, by_head, dfirst, L, chunks, H, G,
    P: tl.constexpr, N: tl.constexpr, plane,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, p, n = tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    decay, skip = tl.load(A + head), tl.load(D + head)
    cell = p[:, None] * N + n[None, :]
    in_cell = in_p[:, None] & in_n[None, :]
    at_state = (sequence * H + head) * P * N
    dstate = tl.load(dlast + at_state + cell, mask=in_cell, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * Q + i
        inside = t < L
        step, from_start, to_end, between, kept = _decays(dt, decay, sequence * L * H + head, t, inside, H, Q)
        position = sequence * L + t
        at_x = (position * H + head)[:, None] * P + p[None, :]
        at_b = (position * G + head // (H // G))[:, None] * N + n[None, :]
        in_x, in_b = inside[:, None] & in_p[None, :], inside[:, None] & in_n[None, :]
        b = tl.load(B + at_b, mask=in_b, other=0.0)
        c = tl.load(C + at_b, mask=in_b, other=0.0)
        g = tl.load(dy + at_x, mask=in_x, other=0.0)
        xs = tl.load(x + at_x, mask=in_x, other=0.0)
        v = step[:, None] * xs
        state = tl.load(states + ((sequence * H + head) * chunks + chunk) * P * N + cell, mask=in_cell, other=0.0)

        mix = tl.dot(c, tl.trans(b), input_precision=PRECISION) * between
        dmix = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        pairs = tl.where(i[:, None] > i[None, :], dmix * mix, 0.0)
        dscores = dmix * between
        read = tl.dot(g * from_start[:, None], state, input_precision=PRECISION)
        # What dt A of a position acts on: pairs around it, what is read behind it, what is written before it.
        dread = tl.sum(read * c, 1) + tl.sum(pairs, 1) - tl.sum(pairs, 0)
        dc = read + tl.dot(dscores, b, input_precision=PRECISION)
        written = tl.dot(b, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
        dwrite = tl.sum(written * v, 1)
        dv = written + tl.dot(tl.trans(mix), g, input_precision=PRECISION)
        db = tl.dot(tl.trans(dscores), c, input_precision=PRECISION)
        db += tl.dot(v * to_end[:, None], dstate, input_precision=PRECISION)
        dkept = kept * tl.sum(tl.sum(state * dstate, 1), 0)
        dlog = tl.cumsum(dread, 0, reverse=True) + tl.cumsum(dwrite, 0) - dwrite + dkept
        dstate = kept * dstate + tl.dot(tl.trans(g * from_start[:, None]), c, input_precision=PRECISION)

        tl.store(dx + at_x, dv * step[:, None] + skip * g, mask=in_x)
        at_t = position * H + head
        tl.store(by_time + at_t, tl.sum(dv * xs, 1) + dlog * decay, mask=inside)
        tl.store(by_time + plane + at_t, dlog, mask=inside)
        at_head = at_t[:, None] * N + n[None, :]
        tl.store(by_head + at_head, db, mask=in_b)
        tl.store(by_head + plane * N + at_head, dc, mask=in_b)
    tl.store(dfirst + at_state + cell, dstate, mask=in_cell)
