"""Discrete Mamba-2, the mixer of Llamba and Phi-Mamba students (arXiv 2408.10189, 2502.14458).

Against Mamba-2: the decay comes straight from the input, exp(-softplus(a)), and what is written is not scaled by it;
the convolution has no activation; the output is gated, silu(z + z_bias), and not normed.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.model.attention import Attention
from thinkfast.model.cache import MambaCache
from thinkfast.model.config import DISCRETE, DecoderConfig, MambaConfig
from thinkfast.model.layers import by_document
from thinkfast.model.mixer import (
    COPIED,
    FITTED,
    GATE_ONE,
    INITIALISED,
    NEW,
    Part,
    StateMixer,
    Trace,
    attention_rows,
    by_query_head,
    channel_factors,
    constant_row,
    convolve,
    half_lives,
    head_shape,
    required,
    split_channels,
)
from thinkfast.ops.ssd import decayed_chunked, decayed_matrix, decayed_step


class DiscreteMamba2(StateMixer):
    """in_proj -> x, B, C, z, a; convolution over x, B, C; S = exp(-softplus(a)) S + x B^T; gate; out_proj."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        shape = self.shape = required(config)
        self.in_proj = nn.Linear(config.hidden_size, shape.in_proj_rows, bias=False)
        self.z_bias = nn.Parameter(torch.zeros(shape.d_inner))
        self.conv1d = nn.Conv1d(shape.conv_dim, shape.conv_dim, shape.d_conv, groups=shape.conv_dim)
        self.D = nn.Parameter(torch.ones(shape.n_heads))
        self.out_proj = nn.Linear(shape.d_inner, config.hidden_size, bias=False)

    def forward(self, u: Tensor, cache: MambaCache | None = None, bounds: Tensor | None = None) -> Tensor:
        """u (B, L, D) -> (B, L, D). With a cache the L tokens follow those it has seen, and it is updated in place.
        With `bounds` one row holds several documents, see `Decoder.hidden`."""
        out: Tensor = self.out_proj(by_document(partial(self._mixed, cache=cache), bounds, self.in_proj(u)))
        return out

    def _mixed(self, rows: Tensor, cache: MambaCache | None) -> Tensor:
        """What in_proj gives (B, L, x + B + C + z + a) -> what out_proj takes (B, L, d_inner)."""
        z, x, log_decay, B, C = self._inputs(rows, cache)
        if cache is not None and rows.shape[1] == 1:
            y, state = decayed_step(x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0], cache.state)
            y = y[:, None]
        else:
            held = None if cache is None else cache.state
            y, state = decayed_chunked(x, log_decay, B, C, held, self.shape.chunk_size)
        if cache is not None:
            cache.state.copy_(state)
        y = (y + self.D.float()[:, None] * x).reshape(z.shape)
        return (y * F.silu((z + self.z_bias).float())).to(rows.dtype)

    def _inputs(self, rows: Tensor, cache: MambaCache | None) -> tuple[Tensor, ...]:
        """z, x, the logarithm of the decay, B and C of the recurrence, all but z in float32."""
        shape = self.shape
        xbc, z, a = torch.split(rows, [shape.conv_dim, shape.d_inner, shape.n_heads], dim=-1)
        x, B, C = split_channels(convolve(self.conv1d, xbc, cache), shape)
        return z, x, -F.softplus(a.float()), B, C

    def matrix(self, u: Tensor) -> Tensor:
        _, _, log_decay, B, C = self._inputs(self.in_proj(u), None)
        return decayed_matrix(log_decay, B, C) + torch.diag_embed(self.D.float()[:, None].expand(-1, u.shape[1]))

    @staticmethod
    def shape_of(teacher: DecoderConfig, n_groups: int | None) -> MambaConfig:
        return head_shape(teacher, n_groups, DISCRETE)

    @staticmethod
    def parts(config: DecoderConfig, calibrated: bool) -> dict[str, Part]:
        shape, hidden = required(config), config.hidden_size
        wide, narrow = shape.d_inner * hidden, shape.n_groups * shape.d_state * hidden
        return {
            "in_proj.weight[x]": (
                wide,
                *((INITIALISED, "v_proj, attention output") if calibrated else (COPIED, "v_proj")),
            ),
            "in_proj.weight[B]": (narrow, INITIALISED if calibrated else COPIED, "k_proj"),
            "in_proj.weight[C]": (narrow, INITIALISED, "q_proj"),
            "in_proj.weight[z]": (wide, NEW, ""),
            "in_proj.weight[a]": (shape.n_heads * hidden, *(FITTED if calibrated else (NEW, ""))),
            "z_bias": (shape.d_inner, NEW, ""),
            "conv1d.weight": (shape.conv_dim * shape.d_conv, NEW, ""),
            "conv1d.bias": (shape.conv_dim, NEW, ""),
            "D": (shape.n_heads, NEW, ""),
            "out_proj.weight": (wide, COPIED, "o_proj"),
        }

    def start(self, attention: Attention, norm_weight: Tensor, trace: Trace | None) -> None:
        """Starts as linear attention with a decay: x, B, C from V, K, Q, the convolution the identity, the gate open.

        Without a bias on `a` a decay that does not depend on the input is a least squares fit on the traced inputs:
        half-lives as in `half_lives`; without a trace it is exp(-softplus(0)) = 1/2 a token. x takes the least squares
        factor from this output to the attention's, channel by channel; what is common to a head is shared out evenly
        over x, B and C, so that one learning rate suits all of them.
        """
        shape = self.shape
        x, B, C, z, a = torch.split(self.in_proj.weight, [shape.d_inner] * 4 + [shape.n_heads])
        values, keys, queries = attention_rows(attention, norm_weight, trace)
        x.copy_(by_query_head(values[0], attention))
        B.copy_(by_query_head(keys[0], attention))
        C.copy_(queries[0] * shape.head_dim**-0.5)
        z.zero_()
        a.zero_()
        self.z_bias.fill_(GATE_ONE)
        self.conv1d.weight.zero_()
        self.conv1d.weight[:, 0, -1] = 1
        if self.conv1d.bias is not None:
            biases = (by_query_head(values[1], attention), by_query_head(keys[1], attention))
            self.conv1d.bias.copy_(torch.cat((*biases, queries[1] * shape.head_dim**-0.5)))
        self.D.zero_()
        self.out_proj.weight.copy_(attention.o_proj.weight)
        if trace is not None:
            a.copy_(constant_row(trace[0], torch.log(torch.expm1(math.log(2) / half_lives(shape.n_heads)))))
            factors = channel_factors(self, trace)
            third = channel_factors(self, trace, shape.head_dim).abs() ** (1 / 3)
            scales = torch.cat((factors / third**2, third, third))
            self.in_proj.weight[: shape.conv_dim].mul_(scales[:, None])
            if self.conv1d.bias is not None:
                self.conv1d.bias.mul_(scales)
