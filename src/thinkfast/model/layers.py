"""Norm, rotary embedding and SwiGLU, shared by every block.

Shape letters: B batch, L length, D hidden, H heads, P head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.model.config import RopeScaling
from thinkfast.ops.cpu import training


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if training.usable(x, self.weight):
            return training.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        if weights[0].shape[0] % training.BLOCK == 0 and training.usable(x, *weights):
            return training.swiglu(x, *weights)
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out

    def as_half(self, x: Tensor, norm: RMSNorm) -> tuple[training.Half, list[Tensor]] | None:
        """x + self(norm(x)) as half a layer with its weights; None where the kernels for training do not take it."""
        weights = [self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight]
        if not training.small(*weights) or not training.usable(x, norm.weight, *weights):
            return None
        return training.Half(norm.eps), [*weights, norm.weight]

    def added(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + self(norm(x)), in one call where that can be."""
        if (half := self.as_half(x, norm)) is not None:
            return training.through(x, [half[0]], half[1])
        out: Tensor = x + self(norm(x))
        return out


def by_document(compute: Callable[..., Tensor], bounds: Tensor | None, *rows: Tensor) -> Tensor:
    """compute(*rows) for tensors (B, L, ...) that give one (B, L, ...): whatever looks back along L.

    With `bounds` (documents + 1,), from 0 to L, each document is computed alone, as if it began a row.
    """
    if bounds is None:
        return compute(*rows)
    sizes = bounds.diff().tolist()
    return torch.cat([compute(*parts) for parts in zip(*(torch.split(t, sizes, 1) for t in rows), strict=True)], 1)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, rotary_dim: int | None = None) -> Tensor:
    """Angular frequency of each pair of channels, shape (head_dim / 2,), float32; llama3 scaling where given.

    With `rotary_dim` only the first rotary_dim / 2 pairs turn.
    """
    if rotary_dim is not None and rotary_dim != head_dim:
        still = torch.zeros((head_dim - rotary_dim) // 2)
        return torch.cat((rope_frequencies(rotary_dim, theta, scaling), still))
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequency = 1.0 / theta**exponent
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / span
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    scaled = torch.where(wavelength > low, frequency / scaling.factor, frequency)
    between = (wavelength <= low) & (wavelength >= high)
    return torch.where(between, blended, scaled)


def apply_rope(x: Tensor, positions: Tensor, frequency: Tensor) -> Tensor:
    """Rotates x (B, L, H, P) by its positions (B, L) or (L,): channel i pairs with i + P/2, as Llama checkpoints do."""
    angle = positions[..., None].float() * frequency
    cos = torch.cos(angle).unsqueeze(-2).to(x.dtype)
    sin = torch.sin(angle).unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
