"""One decoding step of a Mamba-2 layer in one launch: convolution, gates, state update, output, gated norm.

A slot's state is read at every step but written only at every `ring`-th. In between, a ring holds what the steps since
have written: with S the stored state, i steps later

    y = e^(g_1 + ... + g_i) S C + sum_j e^(g_(j+1) + ... + g_i) (B_j . C) v_j        v_j = dt_j x_j, g_j = dt_j A

Bytes a step and head, P = N = 64, two bytes an element: 16384 to read and write the state at every step; with a ring of
8, 8192 to read it, 1024 to write it at every eighth step, 896 for the entries read (3.5 of 2 * 64 on average) and 256
for the one written: 10368, that is 63 %. A ring of 4 takes 66 %, one of 16 takes 66 %. A state in bfloat16 is also
rounded only once in eight steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkfast.ops.triton.pointwise import gated_norm


@dataclass(frozen=True, slots=True)
class StepWeights:
    """What a layer's step reads besides its projections.

    taps (K, conv_dim), bias (conv_dim,); dt_bias, A (negative) and D (H,) in float32; norm (H * P,) of the gated norm.
    """

    taps: Tensor
    bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm: Tensor
    groups: int
    eps: float


@dataclass(frozen=True, slots=True)
class States:
    """What the slots of one layer remember.

    inputs (slots, K, conv_dim): the convolution's last inputs, that of a slot's step t at t % K. state (slots, H, P, N)
    in float32 or bfloat16; v (slots, H, R, P), b (slots, H, R, N) in the same dtype and g (slots, H, R) float32 are the
    ring of the last t % R steps.
    """

    inputs: Tensor
    state: Tensor
    v: Tensor
    b: Tensor
    g: Tensor

    def start(self, slots: Tensor, past: Tensor, state: Tensor) -> None:
        """Puts a state (H, P, N) and the inputs before it (conv_dim, K - 1), oldest first, into slots, at step 0."""
        self.state[slots] = state.to(self.state.dtype)
        if past.shape[1]:
            self.inputs[slots, 1:] = past.t().to(self.inputs.dtype)


def new_states(
    slots: int, weights: StepWeights, head_dim: int, d_state: int, ring: int, dtype: torch.dtype, inputs: torch.dtype
) -> States:
    """Zero states of `slots` slots: `dtype` is that of states and rings, `inputs` that of the projections."""
    heads, device = weights.A.shape[0], weights.A.device
    room = (slots, heads, ring)
    return States(
        torch.zeros(slots, *weights.taps.shape, dtype=inputs, device=device),
        torch.zeros(slots, heads, head_dim, d_state, dtype=dtype, device=device),
        torch.zeros(*room, head_dim, dtype=dtype, device=device),
        torch.zeros(*room, d_state, dtype=dtype, device=device),
        torch.zeros(room, dtype=torch.float32, device=device),
    )


def mamba_step(proj: Tensor, weights: StepWeights, states: States, slots: Tensor, age: Tensor) -> Tensor:
    """The gated and normed output (rows, H * P) of one step; `states` are updated in place.

    proj (rows, z | x | B | C | dt) is what in_proj gives, contiguous; row i belongs to slot slots[i], which has made
    age[i] steps since its `start`. A slot may stand in several rows only where its state does not matter.
    """
    _, heads, head_dim, d_state = states.state.shape
    width, rows = heads * head_dim, proj.shape[0]
    fused = weights.groups == heads
    out = proj.new_empty(rows, width)
    mixed = out if fused else torch.empty(rows, width, dtype=torch.float32, device=proj.device)
    blocks = (triton.next_power_of_2(head_dim), triton.next_power_of_2(d_state))
    _mamba_step[(rows, heads)](
        proj,
        states.inputs,
        weights.taps,
        weights.bias,
        weights.dt_bias,
        weights.A,
        weights.D,
        weights.norm,
        states.state,
        states.v,
        states.b,
        states.g,
        mixed,
        slots,
        age,
        weights.eps,
        heads,
        weights.groups,
        head_dim,
        d_state,
        len(weights.taps),
        states.g.shape[2],
        *blocks,
        fused,
        num_warps=min(max(blocks[0] * blocks[1] // 512, 1), 16),
    )
    return out if fused else gated_norm(mixed, proj[:, :width], weights.norm, weights.groups, weights.eps, out)


@triton.jit
def softplus(value):
    """log(1 + exp(value)), with log1p(u) as log(1 + u) corrected for what 1 + u rounds away."""
    u = tl.exp(-tl.abs(value))
    whole = 1.0 + u
    lost = whole == 1.0
    log = tl.where(lost, u, tl.log(whole) * (u / tl.where(lost, 1.0, whole - 1.0)))
    return tl.maximum(value, 0.0) + log


@triton.jit
def _convolve(now, past, taps, bias, channel, inside, conv_dim, age, K: tl.constexpr):
    value = tl.load(now + channel, mask=inside, other=0.0)
    total = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    total += value.to(tl.float32) * tl.load(taps + (K - 1) * conv_dim + channel, mask=inside, other=0.0).to(tl.float32)
    for back in tl.static_range(1, K):
        before = tl.load(past + (age + K - back) % K * conv_dim + channel, mask=inside, other=0.0).to(tl.float32)
        total += before * tl.load(taps + (K - 1 - back) * conv_dim + channel, mask=inside, other=0.0).to(tl.float32)
    # The heads of a group read the same past; none of them reads the place that each of them writes.
    tl.store(past + age % K * conv_dim + channel, value, mask=inside)
    return total * tl.sigmoid(total)


@triton.jit
def _mamba_step(
    proj,
    inputs,
    taps,
    bias,
    dt_bias,
    A,
    D,
    norm,
    state,
    ring_v,
    ring_b,
    ring_g,
    out,
    slots,
    ages,
    eps,
    H,
    G,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FUSED: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, age = tl.load(slots + row).to(tl.int64), tl.load(ages + row)
    group = head // (H // G)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    width = H * P
    conv_dim = width + 2 * G * N
    line = proj + row * (width + conv_dim + H)
    past = inputs + slot * K * conv_dim
    now = line + width
    x = _convolve(now, past, taps, bias, head * P + p, in_p, conv_dim, age, K)
    b = _convolve(now, past, taps, bias, width + group * N + n, in_n, conv_dim, age, K)
    c = _convolve(now, past, taps, bias, width + (G + group) * N + n, in_n, conv_dim, age, K)
    dt = softplus(tl.load(now + conv_dim + head).to(tl.float32) + tl.load(dt_bias + head))
    g = dt * tl.load(A + head)
    v = dt * x

    place = slot * H + head
    total = g
    y = tl.sum(b * c, 0) * v
    step = age % R
    if R > 1:
        j = tl.arange(0, R)
        older = (j < step)[:, None]
        entry = place * R + j
        vs = tl.load(ring_v + entry[:, None] * P + p[None, :], mask=older & in_p[None, :], other=0.0).to(tl.float32)
        bs = tl.load(ring_b + entry[:, None] * N + n[None, :], mask=older & in_n[None, :], other=0.0).to(tl.float32)
        gs = tl.load(ring_g + entry, mask=j < step, other=0.0)
        after = tl.sum(tl.where(j[None, :] > j[:, None], gs[None, :], 0.0), 1) + g
        scores = tl.exp(after) * tl.sum(bs * c[None, :], 1)
        y += tl.sum(scores[:, None] * vs, 0)
        total += tl.sum(gs, 0)
        tl.store(ring_v + (place * R + step) * P + p, v.to(ring_v.dtype.element_ty), mask=in_p)
        tl.store(ring_b + (place * R + step) * N + n, b.to(ring_b.dtype.element_ty), mask=in_n)
        tl.store(ring_g + place * R + step, g)

    at = state + place * P * N + p[:, None] * N + n[None, :]
    inside = in_p[:, None] & in_n[None, :]
    held = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y += tl.exp(total) * tl.sum(held * c[None, :], 1)
    if step == R - 1:
        for k in range(R - 1):
            v_k = tl.load(ring_v + (place * R + k) * P + p, mask=in_p, other=0.0).to(tl.float32)
            b_k = tl.load(ring_b + (place * R + k) * N + n, mask=in_n, other=0.0).to(tl.float32)
            held = tl.exp(tl.load(ring_g + place * R + k)) * held + v_k[:, None] * b_k[None, :]
        held = tl.exp(g) * held + v[:, None] * b[None, :]
        tl.store(at, held.to(state.dtype.element_ty), mask=inside)

    y += tl.load(D + head) * x
    if FUSED:
        gate = tl.load(line + head * P + p, mask=in_p, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
        y *= tl.rsqrt(tl.sum(y * y, 0) / P + eps)
        y *= tl.load(norm + head * P + p, mask=in_p, other=0.0).to(tl.float32)
    tl.store(out + row * width + head * P + p, y.to(out.dtype.element_ty), mask=in_p)
