"""From a teacher to a student: everything copied bit for bit, and new Mamba-2 mixers that start near the attention they
replace (arXiv 2408.15237, sec. 3: C from Q, B from K, x from V, output from output).

Shapes: B batch, L length, D hidden, H heads, P head_dim = d_state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.errors import BadInput
from thinkfast.model.attention import Attention
from thinkfast.model.config import MAMBA
from thinkfast.model.decoder import Block, Decoder
from thinkfast.model.layers import RMSNorm
from thinkfast.model.mamba2 import Mamba2
from thinkfast.student.plan import LayerPlan

# silu(GATE_ONE) == 1: the value of z at which the gate lets everything pass.
GATE_ONE = 1.2784645427610738
RIDGE = 1e-3
# silu(g v) = g v / 2 + (g v)^2 / 4 + ...: a small gain keeps it nearly linear, and the gated norm takes the factor out.
# Against a gain of 1 it left a third less divergence after the same short training; below 0.1 nothing more was gained.
CONV_GAIN = 0.1
DT = 0.5
HALF_LIVES = (8.0, 512.0)
SMALL = 0.02


def convert(teacher: Decoder, plan: LayerPlan, calibration: Tensor | None = None, seed: int = 0) -> Decoder:
    """A student of `teacher` with the layers of `plan`, in eval mode; the teacher is not changed.

    `calibration` (B, L) holds token ids without padding: the gate and the norm of the new mixers are fitted to what the
    teacher computes on them. Without it the gate starts small and random. `seed` fixes every random number. Raises
    BadInput as `LayerPlan.student_config`, and when the calibration ids are outside the vocabulary.
    """
    config = plan.student_config(teacher.config)
    parameter = teacher.embed_tokens.weight
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        student = Decoder(config).to(parameter.device, parameter.dtype)
        replaced = [index for index, kind in enumerate(config.layer_types) if kind == MAMBA]
        fresh = tuple(f"layers.{index}.mixer." for index in replaced)
        state = {name: value for name, value in student.state_dict().items() if name.startswith(fresh)}
        state |= {name: value for name, value in teacher.state_dict().items() if not name.startswith(fresh)}
        student.load_state_dict(state)
        if plan.init == "attention":
            traces = repeat(None) if calibration is None else attention_traces(teacher, calibration)
            for new, old, trace in zip(blocks(student), blocks(teacher), traces, strict=False):
                if isinstance(new.mixer, Mamba2) and isinstance(old.mixer, Attention):
                    initialise_mixer(new.mixer, old.mixer, old.input_layernorm.weight, trace)
    return student.eval()


@torch.no_grad()
def attention_traces(teacher: Decoder, input_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Layer by layer, the normed input of the attention (B, L, D) and its output before o_proj (B, L, H * P)."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise BadInput(f"calibration ids have shape {tuple(input_ids.shape)}, expected (rows, length)")
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= teacher.config.vocab_size:
        raise BadInput(f"calibration ids are not all in 0..{teacher.config.vocab_size - 1}, the teacher's vocabulary")
    x = teacher.embed_tokens(input_ids)
    for block in blocks(teacher):
        u = block.input_layernorm(x)
        seen: list[Tensor] = []
        with _output_projection(block).register_forward_pre_hook(partial(_keep_input, seen)):
            x = x + block.mix(u)
        x = x + block.mlp(block.post_attention_layernorm(x))
        yield u, seen[0]


def blocks(model: Decoder) -> list[Block]:
    """The layers of a decoder."""
    return [layer for layer in model.layers if isinstance(layer, Block)]


def _output_projection(block: Block) -> nn.Linear:
    return block.mixer.o_proj if isinstance(block.mixer, Attention) else block.mixer.out_proj


def _keep_input(seen: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen.append(inputs[0])


def initialise_mixer(
    mixer: Mamba2, attention: Attention, norm_weight: Tensor, trace: tuple[Tensor, Tensor] | None
) -> None:
    """Starts `mixer` near `attention`, whose inputs are scaled by `norm_weight` (D,); `trace` as in `attention_traces`.

    * x, B, C take the rows of V, K, Q, those of a key/value head repeated for every query head that reads it; C is
      scaled by head_dim ** -0.5 as attention scores are. QK norm becomes the factor for each channel that is nearest to
      it, see `norm_factors`.
    * The convolution only scales: last tap 0.1; its bias is 0, or what the biases of Q, K and V come to behind it, so
      that those are carried over exactly. The SiLU behind it is then nearly linear.
    * dt is 0.5 everywhere and D is 0; the half-lives of the heads are spaced geometrically from 8 to 512 tokens.
    * z is the ridge least squares answer to silu(z) = 1 on the traced inputs, a gate that is open without a bias.
    * The gated norm's weight is, channel by channel, the least squares factor from the new mixer's normed output to the
      traced attention output. Without a trace it is the root mean square of each head's values.
    """
    shape = mixer.shape
    queries_per_key = attention.num_heads // attention.num_kv_heads
    heads = mixer.A_log.numel()

    def per_query_head(weight: Tensor) -> Tensor:
        by_head = weight.view(attention.num_kv_heads, shape.head_dim, *weight.shape[1:])
        return by_head.repeat_interleave(queries_per_key, dim=0).flatten(0, 1)

    def factors(projection: nn.Linear, norm: RMSNorm | None) -> Tensor:
        if norm is None:
            return torch.ones_like(projection.weight[:, 0])
        return norm_factors(projection.weight, norm, norm_weight, None if trace is None else trace[0])

    z, x, B, C, dt = torch.split(mixer.in_proj.weight, [shape.d_inner] * 4 + [heads])
    x.copy_(per_query_head(attention.v_proj.weight))
    by_key = factors(attention.k_proj, attention.k_norm)
    by_query = factors(attention.q_proj, attention.q_norm) * shape.head_dim**-0.5
    B.copy_(per_query_head(attention.k_proj.weight * by_key[:, None]))
    C.copy_(attention.q_proj.weight * by_query[:, None])
    dt.zero_()
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = CONV_GAIN
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
        q, k, v = attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias
        if q is not None and k is not None and v is not None:
            biases = (per_query_head(v), per_query_head(k * by_key), q * by_query)
            mixer.conv1d.bias.copy_(CONV_GAIN * torch.cat(biases))
    mixer.D.zero_()
    mixer.dt_bias.fill_(math.log(math.expm1(DT)))
    shortest, longest = HALF_LIVES
    half_life = shortest * (longest / shortest) ** torch.linspace(0, 1, heads)
    mixer.A_log.copy_(torch.log(math.log(2) / (DT * half_life)))
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    if trace is None:
        z.normal_(std=SMALL)
        power = (x * norm_weight).pow(2).sum(1)
        if attention.v_proj.bias is not None:
            power += per_query_head(attention.v_proj.bias).pow(2)
        rms = power.view(heads, shape.head_dim).mean(1).sqrt()
        mixer.norm.weight.copy_(rms.repeat_interleave(shape.head_dim))
    else:
        u, wanted = trace
        z.copy_(open_gate(u).expand_as(z))
        mixer.norm.weight.fill_(1)
        seen: list[Tensor] = []
        with mixer.out_proj.register_forward_pre_hook(partial(_keep_input, seen)):
            mixer(u)
        made = seen[0].float()
        mixer.norm.weight.copy_((made * wanted).sum((0, 1)) / made.pow(2).sum((0, 1)))


def norm_factors(rows: Tensor, norm: RMSNorm, norm_weight: Tensor, u: Tensor | None) -> Tensor:
    """Factors (H * P,) for the rows (H * P, D) of a projection that come nearest to the norm behind it.

    A norm divides each head by its root mean square, which changes from token to token; a Mamba-2 mixer has no such
    division. The factor is the least squares answer over inputs u (..., D), one a head, times the norm's weight.
    Without inputs it comes from the expected square of a head: inputs of unit variance scaled by `norm_weight` (D,).
    """
    size, rows = norm.weight.numel(), rows.float()
    if u is None:
        square = (rows * norm_weight).pow(2).sum(1).view(-1, size).mean(1)
        scale = torch.rsqrt(square + norm.eps)
    else:
        projected = F.linear(u.flatten(0, -2).float(), rows)
        heads = projected.view(len(projected), -1, size)
        square = heads.pow(2).mean(-1) + norm.eps
        scale = (heads.pow(2).sum(-1) * square.rsqrt()).sum(0) / heads.pow(2).sum((0, 2))
    return (scale[:, None] * norm.weight).flatten()


def open_gate(u: Tensor) -> Tensor:
    """The row w (D,) that makes w . u nearest to the z of an open gate over inputs u (..., D): ridge least squares."""
    rows = u.flatten(0, -2).double()
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(gram, GATE_ONE * rows.sum(0))
    return solution.to(u.dtype)
