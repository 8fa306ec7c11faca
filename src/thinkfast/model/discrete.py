"""Discrete Mamba-2, the mixer of Llamba and Phi-Mamba students (arXiv 2408.10189, 2502.14458).

Against Mamba-2: the decay comes straight from the input, exp(-softplus(a)), and what is written is not scaled by it;
the convolution has no activation; the output is gated, silu(z + z_bias), and not normed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.model.cache import MambaCache
from thinkfast.model.config import DecoderConfig
from thinkfast.ops.conv import causal_conv, causal_conv_step
from thinkfast.ops.ssd import ssd_chunked, ssd_step

SMALLEST_STEP = 1e-20


class DiscreteMamba2(nn.Module):
    """in_proj -> x, B, C, z, a; convolution over x, B, C; S = exp(-softplus(a)) S + x B^T; gate; out_proj."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.mamba is None:
            raise ValueError("the configuration has no mamba shape")
        shape = self.shape = config.mamba
        self.in_proj = nn.Linear(config.hidden_size, shape.in_proj_rows, bias=False)
        self.z_bias = nn.Parameter(torch.zeros(shape.d_inner))
        self.conv1d = nn.Conv1d(shape.conv_dim, shape.conv_dim, shape.d_conv, groups=shape.conv_dim)
        self.D = nn.Parameter(torch.ones(shape.n_heads))
        self.out_proj = nn.Linear(shape.d_inner, config.hidden_size, bias=False)

    def forward(self, u: Tensor, cache: MambaCache | None = None) -> Tensor:
        """u (B, L, D) -> (B, L, D). With a cache the L tokens follow those it has seen, and it is updated in place."""
        shape = self.shape
        batch, length, _ = u.shape
        xbc, z, a = torch.split(self.in_proj(u), [shape.conv_dim, shape.d_inner, shape.n_heads], dim=-1)
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if bias is None:
            raise ValueError("the convolution has no bias")
        # The recurrence of `ops.ssd` writes dt x: with dt = softplus(a), A = -1 and x / dt it is this one.
        dt = F.softplus(a.float()).clamp_min(SMALLEST_STEP)
        A, none = -torch.ones_like(self.D, dtype=torch.float32), torch.zeros_like(self.D, dtype=torch.float32)
        if cache is not None and length == 1:
            mixed, past = causal_conv_step(xbc[:, 0], taps, bias, cache.conv)
            x, B, C = self._parts(mixed)
            y, state = ssd_step(x / dt[:, 0, :, None], dt[:, 0], A, B, C, none, cache.state)
            x, y = x[:, None], y[:, None]
        else:
            mixed, past = causal_conv(xbc, taps, bias, None if cache is None else cache.conv)
            x, B, C = self._parts(mixed)
            held = None if cache is None else cache.state
            y, state = ssd_chunked(x / dt[..., None], dt, A, B, C, none, held, shape.chunk_size)
        if cache is not None:
            cache.conv.copy_(past)
            cache.state.copy_(state)
        y = (y + self.D.float()[:, None] * x).reshape(batch, length, shape.d_inner)
        out: Tensor = self.out_proj((y * F.silu((z + self.z_bias).float())).to(u.dtype))
        return out

    def _parts(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits convolved channels (..., conv_dim) into x (..., H, P), B and C (..., G, N), in float32."""
        shape = self.shape
        width = shape.n_groups * shape.d_state
        x, B, C = torch.split(xbc.float(), [shape.d_inner, width, width], dim=-1)
        by_group = (*xbc.shape[:-1], shape.n_groups, shape.d_state)
        return x.view(*xbc.shape[:-1], shape.n_heads, shape.head_dim), B.view(by_group), C.view(by_group)
