"""Mamba-1 in the shape of MambaInLlama and M1 (arXiv 2312.00752, 2408.15237, 2504.10449): a state of N numbers for each
channel, where N consecutive channels share B and C, and keys and values have fewer heads than queries.

The published code repeats keys and values by groups of N channels, so that most groups meet a slice of another head
(16.7 % line up with 24 heads of 128 over 8). Here a whole head is repeated for every query head that reads it, and only
then cut into groups: group (h, s) reads slice s of key/value head h // (H / KVH), as the attention does.

In a `MambaConfig`: n_heads query heads of head_dim channels, n_groups key/value heads, d_state N.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.errors import BadInput
from thinkfast.model.attention import Attention
from thinkfast.model.cache import MambaCache
from thinkfast.model.config import MAMBA1, DecoderConfig, MambaConfig
from thinkfast.model.layers import by_document
from thinkfast.model.mixer import (
    CONV_GAIN,
    COPIED,
    DT,
    FITTED,
    INITIALISED,
    NEW,
    SMALL,
    Part,
    StateMixer,
    Trace,
    attention_rows,
    by_query_head,
    channel_factors,
    convolve,
    half_lives,
    open_gate,
    required,
)
from thinkfast.ops.scan import selective_chunked, selective_step

D_STATE = 16
RANK_SHARE = 16
DT_RANGE = (1e-3, 1e-1)


class Mamba1(StateMixer):
    """x, B, C, z, dt from projections; heads repeated; convolution and SiLU over x; selective scan; gate; out_proj."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        shape = self.shape = required(config)
        hidden, inner, narrow = config.hidden_size, shape.d_inner, shape.n_groups * shape.head_dim
        rank = -(-hidden // RANK_SHARE)
        self.in_proj_x = nn.Linear(hidden, narrow, bias=False)
        self.in_proj_z = nn.Linear(hidden, inner, bias=False)
        self.B_proj = nn.Linear(hidden, narrow, bias=False)
        self.C_proj = nn.Linear(hidden, inner, bias=False)
        self.dt_proj_down = nn.Linear(hidden, rank, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        low, high = (math.log(bound) for bound in DT_RANGE)
        dt = torch.empty(inner).uniform_(low, high).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(torch.log(torch.expm1(dt)))
        self.conv1d = nn.Conv1d(inner, inner, shape.d_conv, groups=inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, shape.d_state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, u: Tensor, cache: MambaCache | None = None, bounds: Tensor | None = None) -> Tensor:
        """u (B, L, D) -> (B, L, D). With a cache the L tokens follow those it has seen, and it is updated in place.
        With `bounds` one row holds several documents, see `Decoder.hidden`."""
        x, B, C = self._repeated(self.in_proj_x(u)), self._repeated(self.B_proj(u)), self.C_proj(u)
        dt = F.softplus(self.dt_proj(self.dt_proj_down(u)).float())
        y = by_document(partial(self._scanned, cache=cache), bounds, x, dt, B, C)
        out: Tensor = self.out_proj((y * F.silu(self.in_proj_z(u).float())).to(u.dtype))
        return out

    def _scanned(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, cache: MambaCache | None) -> Tensor:
        """Convolution and scan of x, dt, B and C (B, L, H * P) -> (B, L, H * P) in float32."""
        shape = self.shape
        batch, length, _ = x.shape
        x = F.silu(convolve(self.conv1d, x, cache)).float()
        B, C = (t.float().reshape(batch, length, -1, shape.d_state) for t in (B, C))
        A, D = -torch.exp(self.A_log.float()), self.D.float()
        held = None if cache is None else cache.state.view(batch, shape.d_inner, shape.d_state)
        if held is not None and length == 1:
            y, state = selective_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, held)
            y = y[:, None]
        else:
            y, state = selective_chunked(x, dt, A, B, C, D, held)
        if cache is not None:
            cache.state.copy_(state.view(cache.state.shape))
        return y

    def _repeated(self, narrow: Tensor) -> Tensor:
        """(B, L, KVH * P) -> (B, L, H * P), whole heads."""
        shape = self.shape
        heads = narrow.view(*narrow.shape[:2], shape.n_groups, shape.head_dim)
        return heads.repeat_interleave(shape.n_heads // shape.n_groups, dim=2).flatten(2)

    @staticmethod
    def shape_of(teacher: DecoderConfig, n_groups: int | None) -> MambaConfig:
        if n_groups not in (None, teacher.num_kv_heads):
            raise BadInput(f"n_groups is {n_groups}, but Mamba-1 has one for each of {teacher.num_kv_heads} kv heads")
        size = min(D_STATE, teacher.head_dim)
        if teacher.head_dim % size:
            raise BadInput(f"head_dim {teacher.head_dim} is no multiple of Mamba-1's state of {size}")
        return MambaConfig(teacher.num_heads, teacher.head_dim, size, teacher.num_kv_heads, kind=MAMBA1)

    @staticmethod
    def parts(config: DecoderConfig, calibrated: bool) -> dict[str, Part]:
        shape, hidden = required(config), config.hidden_size
        inner, rank = shape.d_inner, -(-hidden // RANK_SHARE)
        narrow = shape.n_groups * shape.head_dim * hidden
        return {
            "in_proj_x.weight": (narrow, INITIALISED if calibrated else COPIED, "v_proj"),
            "in_proj_z.weight": (inner * hidden, *(FITTED if calibrated else (NEW, ""))),
            "B_proj.weight": (narrow, INITIALISED, "k_proj"),
            "C_proj.weight": (inner * hidden, INITIALISED, "q_proj, attention output" if calibrated else "q_proj"),
            "dt_proj_down.weight": (rank * hidden, NEW, ""),
            "dt_proj.weight": (rank * inner, NEW, ""),
            "dt_proj.bias": (inner, NEW, ""),
            "conv1d.weight": (inner * shape.d_conv, NEW, ""),
            "conv1d.bias": (inner, NEW, ""),
            "A_log": (inner * shape.d_state, NEW, ""),
            "D": (inner, NEW, ""),
            "out_proj.weight": (inner * hidden, COPIED, "o_proj"),
        }

    def start(self, attention: Attention, norm_weight: Tensor, trace: Trace | None) -> None:
        """Starts near linear attention with heads of N channels: x, B, C from V, K, Q, dt 0.5, D 0.

        The convolution only scales, as in `Mamba2.start`; what it and dt take away is given back to B and C. Half-lives
        are spaced geometrically over the heads, the same for all of a channel's state. The gate is open where there is
        a trace, and C then takes the least squares factor to the attention's output, group by group; what is common to
        all is shared out evenly over x, B and C, so that one learning rate suits all of them.
        """
        shape = self.shape
        part = (2 / (CONV_GAIN * DT)) ** 0.5
        (value, bias), keys, queries = attention_rows(attention, norm_weight, trace)
        self.in_proj_x.weight.copy_(value)
        self.B_proj.weight.copy_(keys[0] * part)
        self.C_proj.weight.copy_(queries[0] * part * shape.head_dim**-0.5)
        self.conv1d.weight.zero_()
        self.conv1d.weight[:, 0, -1] = CONV_GAIN
        if self.conv1d.bias is not None:
            self.conv1d.bias.copy_(CONV_GAIN * by_query_head(bias, attention))
        self.dt_proj_down.weight.normal_(std=SMALL)
        self.dt_proj.weight.zero_()
        self.dt_proj.bias.fill_(math.log(math.expm1(DT)))
        rates = torch.log(math.log(2) / (DT * half_lives(shape.n_heads)))
        self.A_log.copy_(rates.repeat_interleave(shape.head_dim)[:, None].expand_as(self.A_log))
        self.D.zero_()
        self.out_proj.weight.copy_(attention.o_proj.weight)
        if trace is None:
            self.in_proj_z.weight.normal_(std=SMALL)
        else:
            self.in_proj_z.weight.copy_(open_gate(trace[0]).expand_as(self.in_proj_z.weight))
            factors = channel_factors(self, trace, shape.d_state)
            third = factors.abs().mean() ** (1 / 3)
            for weight, factor in ((self.in_proj_x, third), (self.B_proj, third), (self.C_proj, factors / third**2)):
                weight.weight.mul_(factor if factor.ndim == 0 else factor[:, None])
            if self.conv1d.bias is not None:
                self.conv1d.bias.mul_(third)
