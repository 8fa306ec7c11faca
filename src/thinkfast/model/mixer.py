"""What every mixer with a state is and can do, and what they share: convolution, recurrence, and starting near an
attention layer.

A new kind is one file with a subclass of `StateMixer`, a line in `mixers.py`, a name in `config.py`, and its tests.
Shapes: B batch, L length, D hidden, H query heads, P head_dim, N d_state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.errors import BadInput
from thinkfast.model.attention import Attention
from thinkfast.model.cache import MambaCache
from thinkfast.model.config import DecoderConfig, MambaConfig
from thinkfast.model.layers import RMSNorm
from thinkfast.ops.conv import causal_conv, causal_conv_step
from thinkfast.ops.cpu import training

# silu(GATE_ONE) == 1: the value of z at which the gate lets everything pass.
GATE_ONE = 1.2784645427610738
# silu(g v) = g v / 2 + (g v)^2 / 4 + ...: a small gain keeps it nearly linear, and the gated norm takes the factor out.
# Against a gain of 1 it left a third less divergence after the same short training; below 0.1 nothing more was gained.
CONV_GAIN = 0.1
DT = 0.5
HALF_LIVES = (8.0, 512.0)
RIDGE = 1e-3
SMALL = 0.02
COPIED, INITIALISED, NEW = "copied", "initialised", "new"
FITTED = (INITIALISED, "layer inputs, least squares")
Trace = tuple[Tensor, Tensor]
"""The inputs (B, L, D) of an attention layer and its outputs before o_proj (B, L, H * P)."""
Part = tuple[int, str, str]
"""Of a tensor, or of some rows of one: how many numbers, how it is made from attention, and from what."""


class StateMixer(nn.Module, ABC):
    """A mixer that carries a state of fixed size from token to token: forward(u, cache, bounds).

    `normed`: its output does not depend on the scale of the recurrence's, position by position.
    """

    normed: ClassVar[bool] = False
    shape: MambaConfig
    out_proj: nn.Linear

    @staticmethod
    @abstractmethod
    def shape_of(teacher: DecoderConfig, n_groups: int | None) -> MambaConfig:
        """The shape that replaces an attention layer of `teacher`. Raises BadInput where there is none."""

    @staticmethod
    @abstractmethod
    def parts(config: DecoderConfig, calibrated: bool) -> dict[str, Part]:
        """Every parameter by name, as far as they are made differently, when started with or without a trace."""

    @abstractmethod
    def start(self, attention: Attention, norm_weight: Tensor, trace: Trace | None) -> None:
        """Starts near `attention`, whose inputs are scaled by `norm_weight` (D,); in place, without a gradient."""

    def as_half(self, x: Tensor, norm: RMSNorm) -> tuple[training.Half, list[Tensor]] | None:
        """x + self(norm(x)) as half a layer with its weights, for the kinds that the kernels for training take."""
        return None

    def added(self, x: Tensor, norm: RMSNorm, bounds: Tensor | None = None) -> Tensor:
        """x + self(norm(x)), in one call where that can be."""
        if (half := self.as_half(x, norm)) is not None:
            return training.through(x, [half[0]], half[1], bounds)
        out: Tensor = x + self(norm(x), None, bounds)
        return out

    def matrix(self, u: Tensor) -> Tensor:
        """What the recurrence multiplies its values by, (B, H, L, L), for inputs u (B, L, D): the counterpart of the
        attention matrix. Raises BadInput for a kind that has no single matrix a head."""
        raise BadInput(f"{self.shape.title} has no mixer matrix a head: leave the stage 'matrices' out")


def required(config: DecoderConfig) -> MambaConfig:
    """The shape of the mixers of a configuration that has them."""
    if config.mamba is None:
        raise ValueError("the configuration has no mamba shape")
    return config.mamba


def convolve(conv: nn.Conv1d, x: Tensor, cache: MambaCache | None) -> Tensor:
    """The causal convolution of x (B, L, Ch) behind what the cache has seen; updates it."""
    taps, bias = conv.weight.squeeze(1), conv.bias
    if bias is None:
        raise ValueError("the convolution has no bias")
    if cache is None:
        return causal_conv(x, taps, bias)[0]
    if x.shape[1] == 1:
        y, past = causal_conv_step(x[:, 0], taps, bias, cache.conv)
        y = y[:, None]
    else:
        y, past = causal_conv(x, taps, bias, cache.conv)
    cache.conv.copy_(past)
    return y


def split_channels(xbc: Tensor, shape: MambaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Splits convolved channels (..., conv_dim) into x (..., H, P), B and C (..., G, N), in float32."""
    width = shape.n_groups * shape.d_state
    x, B, C = torch.split(xbc.float(), [shape.d_inner, width, width], dim=-1)
    by_group = (*xbc.shape[:-1], shape.n_groups, shape.d_state)
    return x.view(*xbc.shape[:-1], shape.n_heads, shape.head_dim), B.view(by_group), C.view(by_group)


def head_shape(teacher: DecoderConfig, n_groups: int | None, kind: str) -> MambaConfig:
    """One Mamba head a query head, head_dim = d_state = the teacher's head_dim, by default one group a head."""
    heads = teacher.num_heads
    groups = heads if n_groups is None else n_groups
    if groups < 1 or heads % groups:
        raise BadInput(f"n_groups is {groups}, expected a divisor of the {heads} heads")
    return MambaConfig(heads, teacher.head_dim, teacher.head_dim, groups, chunk_size=teacher.head_dim, kind=kind)


def by_query_head(weight: Tensor, attention: Attention) -> Tensor:
    """Rows (KVH * P, ...) of keys or values, those of a head repeated for every query head that reads it."""
    by_head = weight.view(attention.num_kv_heads, attention.head_dim, *weight.shape[1:])
    return by_head.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=0).flatten(0, 1)


def rows_of(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a projection; the bias is zero where it has none."""
    bias: Tensor | None = linear.bias
    return linear.weight, linear.weight.new_zeros(linear.out_features) if bias is None else bias


def attention_rows(
    attention: Attention, norm_weight: Tensor, trace: Trace | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weight and bias of the projections to values, keys and queries. A norm behind keys and queries becomes the
    factors nearest to it."""
    found = [rows_of(attention.v_proj)]
    for projection, norm in ((attention.k_proj, attention.k_norm), (attention.q_proj, attention.q_norm)):
        weight, bias = rows_of(projection)
        if norm is not None:
            factors = norm_factors(weight, norm, norm_weight, None if trace is None else trace[0])
            weight, bias = weight * factors[:, None], bias * factors
        found.append((weight, bias))
    return found[0], found[1], found[2]


def norm_factors(rows: Tensor, norm: RMSNorm, norm_weight: Tensor, u: Tensor | None) -> Tensor:
    """Factors (H * P,) for the rows (H * P, D) of a projection that come nearest to the norm behind it.

    A norm divides each head by its root mean square, which changes from token to token; a mixer with a state has no
    such division. The factor is the least squares answer over inputs u (..., D), one a head, times the norm's weight.
    Without inputs it comes from the expected square of a head: inputs of unit variance scaled by `norm_weight` (D,).
    """
    size, wide = norm.weight.numel(), rows.float()
    if u is None:
        square = (wide * norm_weight).pow(2).sum(1).view(-1, size).mean(1)
        scale = torch.rsqrt(square + norm.eps)
    else:
        projected = F.linear(u.flatten(0, -2).float(), wide)
        heads = projected.view(len(projected), -1, size)
        square = heads.pow(2).mean(-1) + norm.eps
        scale = (heads.pow(2).sum(-1) * square.rsqrt()).sum(0) / heads.pow(2).sum((0, 2))
    return (scale[:, None] * norm.weight).flatten().to(rows.dtype)


def half_lives(heads: int) -> Tensor:
    """Tokens after which the state of each head has halved, spaced geometrically."""
    shortest, longest = HALF_LIVES
    return shortest * (longest / shortest) ** torch.linspace(0, 1, heads)


def constant_row(u: Tensor, value: float | Tensor) -> Tensor:
    """The row w (D,) that makes w . u nearest to `value` over inputs u (..., D): ridge least squares. For several
    values (K,) a row each."""
    rows = u.flatten(0, -2).double()
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, rows.sum(0))
    if isinstance(value, Tensor):
        return (value.double()[:, None] * solution).to(u.dtype)
    return (value * solution).to(u.dtype)


def open_gate(u: Tensor) -> Tensor:
    """The row w (D,) that makes w . u nearest to the z of an open gate over inputs u (..., D)."""
    return constant_row(u, GATE_ONE)


def channel_factors(mixer: StateMixer, trace: Trace, size: int = 1) -> Tensor:
    """The least squares factor (H * P,) from what the mixer hands to out_proj to what the attention handed to o_proj,
    the same for `size` consecutive channels."""
    u, wanted = trace
    seen: list[Tensor] = []
    with mixer.out_proj.register_forward_pre_hook(partial(keep_input, seen)):
        mixer(u)
    made = seen[0].float()
    above = (made * wanted).sum((0, 1)).view(-1, size).sum(1)
    below = made.pow(2).sum((0, 1)).view(-1, size).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (above / below).repeat_interleave(size)


def keep_input(seen: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A hook that keeps what a module is given."""
    seen.append(inputs[0])
