"""Every kernel against its definition in float64 on fresh random inputs, on any device: for tests and for new machines.

Each function returns the relative error |got - want| / |want| (2-norms), infinite where anything is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thinkfast.ops.conv import causal_conv
from thinkfast.ops.ssd import ssd_naive
from thinkfast.ops.triton.attention import Blocks, attend, rotate_and_append, share
from thinkfast.ops.triton.mixer import StepWeights, mamba_step, new_states
from thinkfast.ops.triton.pointwise import add_norm, gated_norm, swiglu


def error(got: Tensor, want: Tensor) -> float:
    """The relative error of `got`."""
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    return float((got.double() - want.double()).norm() / want.double().norm())


class Draw:
    """Random tensors, the same for a seed on every device."""

    def __init__(self, seed: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = torch.Generator().manual_seed(seed), device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator)
        return drawn.to(self.device, self.dtype if dtype is None else dtype)


def check_pointwise(
    rows: int, size: int, groups: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """`add_norm` (with and without a sum), `swiglu` and `gated_norm`."""
    draw, eps = Draw(rows + size, device, dtype), 1e-5
    x, delta, weight, wide = draw(rows, size), draw(rows, size), draw(size), draw(rows, 2 * size + 3)
    errors = {}
    for name, added in (("norm", None), ("add_norm", delta)):
        total = x if added is None else x + added
        held = x.clone()
        got = add_norm(held, added, weight, eps)
        want = total.double() * torch.rsqrt(total.double().pow(2).mean(-1, keepdim=True) + eps) * weight.double()
        errors[name] = max(error(got, want), error(held, total))
    gate, up = wide[:, :size].double(), wide[:, size : 2 * size].double()
    errors["swiglu"] = error(swiglu(wide[:, : 2 * size].contiguous()), F.silu(gate) * up)
    z = wide[:, 1 : size + 1]
    gated = (x.double() * F.silu(z.double())).view(rows, groups, -1)
    want = (gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + eps)).view(rows, size) * weight.double()
    errors["gated_norm"] = error(gated_norm(x, z, weight, groups, eps, torch.empty_like(x)), want)
    return errors


def check_step(
    rows: int,
    heads: int,
    groups: int,
    head_dim: int,
    d_state: int,
    taps: int = 4,
    ring: int = 8,
    steps: int = 11,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
) -> float:
    """`mamba_step`, `steps` times from random states in slots in another order than the rows, against `ssd_naive`."""
    draw, eps = Draw(heads * 31 + d_state, device, dtype), 1e-5
    width, channels = heads * head_dim, heads * head_dim + 2 * groups * d_state

    def single(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.float32)

    weights = StepWeights(
        draw(taps, channels), draw(channels), single(heads) - 2, -torch.exp(single(heads)), single(heads), draw(width),
        groups, eps,
    )  # fmt: skip
    past, state = draw(rows, channels, taps - 1), single(rows, heads, head_dim, d_state)
    proj = draw(rows, steps, width + channels + heads)
    slots = (torch.arange(rows, device=device) * 2 + 1).flip(0)
    states = new_states(2 * rows + 1, weights, head_dim, d_state, ring, state_dtype, dtype)
    for part in (states.inputs, states.state, states.v, states.b, states.g):
        part.fill_(float("nan"))  # what an earlier sample may have left
    got = []
    for row in range(rows):
        states.start(slots[row : row + 1], past[row], state[row])
    for step in range(steps):
        age = torch.full((rows,), step, dtype=torch.int64, device=device)
        got.append(mamba_step(proj[:, step].contiguous(), weights, states, slots, age))

    z, xbc, dt = (part.double() for part in torch.split(proj, [width, channels, heads], dim=-1))
    mixed, _ = causal_conv(xbc, weights.taps.double().t(), weights.bias.double(), past.double())
    x, b, c = torch.split(F.silu(mixed), [width, groups * d_state, groups * d_state], dim=-1)
    y, last = ssd_naive(
        x.view(rows, steps, heads, head_dim),
        F.softplus(dt + weights.dt_bias.double()),
        weights.A.double(),
        b.view(rows, steps, groups, d_state),
        c.view(rows, steps, groups, d_state),
        weights.D.double(),
        state.double(),
    )
    gated = (y.reshape(rows, steps, width) * F.silu(z)).view(rows, steps, groups, -1)
    normed = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + eps)
    want = normed.view(rows, steps, width) * weights.norm.double()
    wrong = error(torch.stack(got, 1), want)
    return max(wrong, error(states.state[slots], last)) if steps % ring == 0 else wrong


def check_attention(
    prompts: Sequence[int],
    prefixes: Sequence[int],
    own: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    splits: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype = torch.float32,
) -> float:
    """`rotate_and_append` and `attend`: row i has the prompt prefixes[i] of prompts[...] tokens and own[i] of its own
    before the one that is appended."""
    rows, capacity = len(own), max(own) + 2
    draw = Draw(heads * 7 + head_dim + rows, device, dtype)
    shared = [draw(2, kv_heads, length, head_dim, dtype=kv_dtype) for length in prompts]
    keys, values = (draw(rows + 1, kv_heads, capacity, head_dim, dtype=kv_dtype) for _ in range(2))
    qkv = draw(rows, (heads + 2 * kv_heads) * head_dim)
    ages, which = torch.tensor(own, device=device), np.array(prefixes, np.int64)
    position = ages + torch.tensor([prompts[p] for p in prefixes], device=device)
    for row, length in enumerate(own):
        keys[rows - row, :, length:], values[rows - row, :, length:] = float("nan"), float("nan")
    slots = torch.arange(rows, 0, -1, device=device)
    angle = torch.arange(int(position.max()) + 1)[:, None] / 3.0 ** torch.arange(head_dim // 2)
    cosine, sine = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    plan = share(which)
    address = torch.tensor([[[shared[p][kind].data_ptr() if p >= 0 else 0 for p in plan[3]] for kind in range(2)]])
    lengths = torch.tensor([prompts[p] if p >= 0 else 0 for p in plan[3]])
    order, first, count = (torch.from_numpy(part).to(device) for part in plan[:3])
    blocks = Blocks(order, first, count, lengths.to(device), address.to(device))

    queries = rotate_and_append(qkv, keys, values, cosine, sine, slots, position, ages)
    got = attend(queries, keys, values, slots, ages, blocks, 0, splits).view(rows, heads, head_dim)

    parts = qkv.double().view(rows, heads + 2 * kv_heads, head_dim)
    turned = torch.cat([-parts[..., head_dim // 2 :], parts[..., : head_dim // 2]], -1)
    cos, sin = (torch.cat([t[position], t[position]], -1)[:, None].double() for t in (cosine, sine))
    rotated = parts * cos + turned * sin
    wrong = error(queries, rotated[:, :heads])
    want = torch.empty_like(got, dtype=torch.float64)
    for row, held in enumerate(own):
        slot = rows - row
        new = (rotated[row, heads : heads + kv_heads], parts[row, heads + kv_heads :])
        wrong = max(wrong, *(error(t[slot, :, held], n) for t, n in zip((keys, values), new, strict=True)))
        k, v = (
            torch.cat([shared[prefixes[row]][kind].double(), t[slot, :, : held + 1].double()], 1)
            for kind, t in enumerate((keys, values))
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        scores = (k @ queries[row].double()[..., None]).squeeze(-1) * head_dim**-0.5
        want[row] = (scores.softmax(-1)[:, None] @ v).squeeze(1)
    return max(wrong, error(got, want))
