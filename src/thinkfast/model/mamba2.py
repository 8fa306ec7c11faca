"""The Mamba-2 mixer in the definition of stock GraniteMoeHybrid checkpoints (arXiv 2405.21060)."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.errors import BadInput
from thinkfast.model.attention import Attention
from thinkfast.model.cache import MambaCache
from thinkfast.model.config import MAMBA2, DecoderConfig, MambaConfig
from thinkfast.model.layers import RMSNorm, by_document
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
    head_shape,
    open_gate,
    required,
    split_channels,
)
from thinkfast.ops.cpu import training
from thinkfast.ops.ssd import decayed_matrix, ssd_step
from thinkfast.ops.triton import chunked_scan

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


class Mamba2(StateMixer):
    """in_proj -> z, x, B, C, dt; convolution and SiLU over x, B, C; state-space recurrence; gated norm; out_proj."""

    normed = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        shape = self.shape = required(config)
        self.in_proj = nn.Linear(config.hidden_size, shape.in_proj_rows, bias=False)
        self.conv1d = nn.Conv1d(shape.conv_dim, shape.conv_dim, shape.d_conv, groups=shape.conv_dim)
        low, high = (math.log(bound) for bound in DT_RANGE)
        dt = torch.empty(shape.n_heads).uniform_(low, high).exp()
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.log(torch.empty(shape.n_heads).uniform_(*A_RANGE)))
        self.D = nn.Parameter(torch.ones(shape.n_heads))
        self.norm = GroupedGatedNorm(shape.d_inner, shape.n_groups, config.rms_norm_eps)
        self.out_proj = nn.Linear(shape.d_inner, config.hidden_size, bias=False)

    def forward(self, u: Tensor, cache: MambaCache | None = None, bounds: Tensor | None = None) -> Tensor:
        """u (B, L, D) -> (B, L, D). With a cache the L tokens follow those it has seen, and it is updated in place.
        With `bounds` one row holds several documents, see `Decoder.hidden`."""
        if cache is None and (fused := self._fused(u, bounds)) is not None:
            return fused
        out: Tensor = self.out_proj(by_document(partial(self._mixed, cache=cache), bounds, self.in_proj(u)))
        return out

    def _mixed(self, rows: Tensor, cache: MambaCache | None) -> Tensor:
        """What in_proj gives (B, L, z + x + B + C + dt) -> what out_proj takes (B, L, d_inner)."""
        z, x, dt, A, B, C = self._inputs(rows, cache)
        D = self.D.float()
        if cache is not None and rows.shape[1] == 1:
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, cache.state)
        else:
            held = None if cache is None else cache.state
            scan = chunked_scan(z, max(self.shape.head_dim, self.shape.d_state))
            y, state = scan(x, dt, A, B, C, D, held, self.shape.chunk_size)
        if cache is not None:
            cache.state.copy_(state)
        normed: Tensor = self.norm(y.reshape(z.shape), z)
        return normed

    def as_half(self, x: Tensor, norm: RMSNorm) -> tuple[training.Half, list[Tensor]] | None:
        matrices = self.in_proj.weight, self.out_proj.weight
        given = self._kernel_inputs(x, norm.weight, *matrices) if training.small(*matrices) else None
        if given is None:
            return None
        return training.Half(norm.eps, given[1]), [*matrices, norm.weight, *given[0]]

    def _fused(self, u: Tensor, bounds: Tensor | None = None) -> Tensor | None:
        """The same as the plain path by the kernels for training, where they take it."""
        given = self._kernel_inputs(u, self.in_proj.weight)
        if given is None:
            return None
        out: Tensor = self.out_proj(training.mixer(self.in_proj(u), *given, bounds))
        return out

    def _kernel_inputs(self, u: Tensor, *matrices: Tensor) -> tuple[list[Tensor], training.MixerShape] | None:
        """Weights and sizes for the kernels for training; None where these do not take them."""
        bias, shape = self.conv1d.bias, self.shape
        if bias is None or self.norm.groups != shape.n_groups:
            return None
        weights = [self.conv1d.weight, bias, self.dt_bias, self.A_log, self.D, self.norm.weight]
        sizes = shape.n_heads, shape.head_dim, shape.d_state, shape.n_groups, shape.d_conv, shape.chunk_size
        fused = training.MixerShape(*sizes, self.norm.eps)
        return (weights, fused) if fused.fits and training.usable(u, *matrices, *weights) else None

    def _inputs(self, rows: Tensor, cache: MambaCache | None) -> tuple[Tensor, ...]:
        """z, x, dt, A, B, C of the recurrence, all but z in float32."""
        shape = self.shape
        z, xbc, dt = torch.split(rows, [shape.d_inner, shape.conv_dim, shape.n_heads], dim=-1)
        x, B, C = split_channels(F.silu(convolve(self.conv1d, xbc, cache)), shape)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        return z, x, dt, -torch.exp(self.A_log.float()), B, C

    def matrix(self, u: Tensor) -> Tensor:
        _, _, dt, A, B, C = self._inputs(self.in_proj(u), None)
        written = decayed_matrix(dt * A, B, C) * dt.transpose(1, 2)[:, :, None]
        return written + torch.diag_embed(self.D.float()[:, None].expand(-1, u.shape[1]))

    @staticmethod
    def shape_of(teacher: DecoderConfig, n_groups: int | None) -> MambaConfig:
        shape = head_shape(teacher, n_groups, MAMBA2)
        if shape.d_inner % teacher.hidden_size:
            raise BadInput(
                f"{shape.n_heads} heads of {teacher.head_dim} are no multiple of hidden_size {teacher.hidden_size}; "
                "the stock layout of a student needs a whole expansion factor"
            )
        return shape

    @staticmethod
    def parts(config: DecoderConfig, calibrated: bool) -> dict[str, Part]:
        shape, hidden = required(config), config.hidden_size
        wide, narrow = shape.d_inner * hidden, shape.n_groups * shape.d_state * hidden
        return {
            "in_proj.weight[z]": (wide, *(FITTED if calibrated else (NEW, ""))),
            "in_proj.weight[x]": (wide, COPIED, "v_proj"),
            "in_proj.weight[B]": (narrow, COPIED, "k_proj"),
            "in_proj.weight[C]": (narrow, INITIALISED, "q_proj"),
            "in_proj.weight[dt]": (shape.n_heads * hidden, NEW, ""),
            "conv1d.weight": (shape.conv_dim * shape.d_conv, NEW, ""),
            "conv1d.bias": (shape.conv_dim, NEW, ""),
            "A_log": (shape.n_heads, NEW, ""),
            "D": (shape.n_heads, NEW, ""),
            "dt_bias": (shape.n_heads, NEW, ""),
            "norm.weight": (shape.d_inner, INITIALISED, "attention output, least squares" if calibrated else "v_proj"),
            "out_proj.weight": (wide, COPIED, "o_proj"),
        }

    def start(self, attention: Attention, norm_weight: Tensor, trace: Trace | None) -> None:
        """Starts near `attention` (arXiv 2408.15237, sec. 3: C from Q, B from K, x from V, output from output).

        * x, B, C take the rows of V, K, Q, those of a key/value head repeated for every query head that reads it; C is
          scaled by head_dim ** -0.5 as attention scores are. QK norm becomes factors, see `norm_factors`.
        * The convolution only scales: last tap 0.1, and as bias that of the projections, if any. The SiLU behind it is
          then nearly linear.
        * dt is 0.5 everywhere and D is 0; the half-lives of the heads are spaced geometrically from 8 to 512 tokens.
        * z is the ridge least squares answer to silu(z) = 1 on the traced inputs, a gate that is open without a bias.
        * The gated norm's weight is, channel by channel, the least squares factor from the new mixer's normed output to
          the traced attention output. Without a trace it is the root mean square of each head's values.
        """
        shape = self.shape
        z, x, B, C, dt = torch.split(self.in_proj.weight, [shape.d_inner] * 4 + [shape.n_heads])
        values, keys, queries = attention_rows(attention, norm_weight, trace)
        x.copy_(by_query_head(values[0], attention))
        B.copy_(by_query_head(keys[0], attention))
        C.copy_(queries[0] * shape.head_dim**-0.5)
        dt.zero_()
        self.conv1d.weight.zero_()
        self.conv1d.weight[:, 0, -1] = CONV_GAIN
        if self.conv1d.bias is not None:
            biases = (by_query_head(values[1], attention), by_query_head(keys[1], attention))
            self.conv1d.bias.copy_(CONV_GAIN * torch.cat((*biases, queries[1] * shape.head_dim**-0.5)))
        self.D.zero_()
        self.dt_bias.fill_(math.log(math.expm1(DT)))
        self.A_log.copy_(torch.log(math.log(2) / (DT * half_lives(shape.n_heads))))
        self.out_proj.weight.copy_(attention.o_proj.weight)
        if trace is None:
            z.normal_(std=SMALL)
            power = (x * norm_weight).pow(2).sum(1) + by_query_head(values[1], attention).pow(2)
            rms = power.view(shape.n_heads, shape.head_dim).mean(1).sqrt()
            self.norm.weight.copy_(rms.repeat_interleave(shape.head_dim))
        else:
            z.copy_(open_gate(trace[0]).expand_as(z))
            self.norm.weight.fill_(1)
            self.norm.weight.copy_(channel_factors(self, trace))
