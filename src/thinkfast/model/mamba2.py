"""The Mamba-2 mixer in the definition of stock GraniteMoeHybrid checkpoints (arXiv 2405.21060)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.model.cache import MambaCache
from thinkfast.model.config import DecoderConfig
from thinkfast.ops.conv import causal_conv, causal_conv_step
from thinkfast.ops.ssd import ssd_chunked, ssd_step

DT_RANGE = (1e-3, 1e-1)
A_RANGE = (1.0, 16.0)


class GroupedGatedNorm(nn.Module):
    """rms_norm(y * silu(z)) * weight, with one rms for each of `groups` equal slices of the last axis."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z (..., size) -> (..., size), computed in float32."""
        gated = y.float() * F.silu(z.float())
        slices = gated.view(*gated.shape[:-1], self.groups, -1)
        scale = torch.rsqrt(slices.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (slices * scale).view(gated.shape).to(z.dtype)


class Mamba2(nn.Module):
    """in_proj -> z, x, B, C, dt; convolution and SiLU over x, B, C; state-space recurrence; gated norm; out_proj."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.mamba is None:
            raise ValueError("the configuration has no mamba shape")
        shape = self.shape = config.mamba
        self.in_proj = nn.Linear(config.hidden_size, shape.in_proj_rows, bias=False)
        self.conv1d = nn.Conv1d(shape.conv_dim, shape.conv_dim, shape.d_conv, groups=shape.conv_dim)
        low, high = (math.log(bound) for bound in DT_RANGE)
        dt = torch.empty(shape.n_heads).uniform_(low, high).exp()
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.log(torch.empty(shape.n_heads).uniform_(*A_RANGE)))
        self.D = nn.Parameter(torch.ones(shape.n_heads))
        self.norm = GroupedGatedNorm(shape.d_inner, shape.n_groups, config.rms_norm_eps)
        self.out_proj = nn.Linear(shape.d_inner, config.hidden_size, bias=False)

    def forward(self, u: Tensor, cache: MambaCache | None = None) -> Tensor:
        """u (B, L, D) -> (B, L, D). With a cache the L tokens follow those it has seen, and it is updated in place."""
        shape = self.shape
        batch, length, _ = u.shape
        z, xbc, dt = torch.split(self.in_proj(u), [shape.d_inner, shape.conv_dim, shape.n_heads], dim=-1)
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if bias is None:
            raise ValueError("the convolution has no bias")
        A = -torch.exp(self.A_log.float())
        dt = F.softplus(dt.float() + self.dt_bias.float())
        D = self.D.float()
        if cache is not None and length == 1:
            mixed, past = causal_conv_step(xbc[:, 0], taps, bias, cache.conv)
            x, B, C = self._parts(F.silu(mixed))
            y, state = ssd_step(x, dt[:, 0], A, B, C, D, cache.state)
            y = y[:, None]
        else:
            mixed, past = causal_conv(xbc, taps, bias, None if cache is None else cache.conv)
            x, B, C = self._parts(F.silu(mixed))
            y, state = ssd_chunked(x, dt, A, B, C, D, None if cache is None else cache.state, shape.chunk_size)
        if cache is not None:
            cache.conv.copy_(past)
            cache.state.copy_(state)
        out: Tensor = self.out_proj(self.norm(y.reshape(batch, length, shape.d_inner), z))
        return out

    def _parts(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits convolved channels (..., conv_dim) into x (..., H, P), B and C (..., G, N), in float32."""
        shape = self.shape
        width = shape.n_groups * shape.d_state
        x, B, C = torch.split(xbc.float(), [shape.d_inner, width, width], dim=-1)
        by_group = (*xbc.shape[:-1], shape.n_groups, shape.d_state)
        return x.view(*xbc.shape[:-1], shape.n_heads, shape.head_dim), B.view(by_group), C.view(by_group)
