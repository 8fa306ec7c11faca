"""Norms and activations, each with what comes before it in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SWIGLU_BLOCK = 1024


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place, then RMSNorm: x / rms(x) * weight. x and delta (rows, D), contiguous -> (rows, D)."""
    rows, size = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](
        x, x if delta is None else delta, weight, out, eps, size, delta is not None, block, num_warps=_warps(block)
    )
    return out


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up for `both` (rows, 2 F), contiguous, which holds gate, then up -> (rows, F)."""
    rows, size = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, size)
    _swiglu[(rows, triton.cdiv(size, SWIGLU_BLOCK))](both, out, size, SWIGLU_BLOCK, num_warps=4)
    return out


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, out: Tensor) -> Tensor:
    """RMSNorm of y * silu(z) over each of `groups` equal slices of a row, times `weight`, into `out`.

    y, z and out (rows, size); rows of z may lie apart, as slices of a wider matrix do.
    """
    rows, size = y.shape
    width = size // groups
    block = triton.next_power_of_2(width)
    _gated_norm[(rows, groups)](y, z, weight, out, eps, size, z.stride(0), width, block, num_warps=_warps(block))
    return out


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)


@triton.jit
def _add_norm(x, delta, weight, out, eps, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < size
    at = tl.program_id(0).to(tl.int64) * size + i
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(x + at, value, mask=inside)
    wide = value.to(tl.float32)
    # Rounded before the weight, as the decoder does.
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)).to(value.dtype).to(tl.float32)
    scaled = normed * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, scaled.to(value.dtype), mask=inside)


@triton.jit
def _swiglu(both, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.load(both + row * 2 * size + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + i, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_norm(y, z, weight, out, eps, size, z_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    at = tl.program_id(1) * width + i
    gate = tl.load(z + row * z_stride + at, mask=inside, other=0.0).to(tl.float32)
    gated = tl.load(y + row * size + at, mask=inside, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    scaled = gated * tl.rsqrt(tl.sum(gated * gated, 0) / width + eps)
    scaled *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, scaled.to(out.dtype.element_ty), mask=inside)
