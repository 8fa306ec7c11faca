"""Norm, SwiGLU, attention and the Mamba-2 mixer for training on a CPU, by the kernels of `train.cpp`.

Float32 throughout. Each is compared with the plain torch path, which stays in use wherever `usable` says no. Results
do not depend on the number of threads, except through torch's own matrix products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from thinkfast.ops.cpu.build import BuildError, build

BLOCK, MAX_CHUNK, MAX_TAPS = 16, 64, 4
NORM_ROWS = 64
MIN_ROWS = 64
"""With fewer rows the plain path serves: a model that only answers a few tokens should not wait for a compiler."""


@dataclass(frozen=True, slots=True)
class MixerShape:
    """Sizes of a Mamba-2 mixer; `chunk` is how many positions its scan takes at a time."""

    heads: int
    head_dim: int
    d_state: int
    groups: int
    taps: int
    chunk: int
    eps: float

    @property
    def fits(self) -> bool:
        """Whether the kernels take these sizes."""
        return self.head_dim % BLOCK == 0 and self.d_state % BLOCK == 0 and 2 <= self.taps <= MAX_TAPS

    @property
    def sizes(self) -> Any:
        chunk = min(max(self.chunk, BLOCK), MAX_CHUNK) // BLOCK * BLOCK
        return (ctypes.c_int32 * 6)(self.heads, self.head_dim, self.d_state, self.groups, self.taps, chunk)


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be compiled or loaded."""
    try:
        lib = ctypes.CDLL(str(build("train")))
    except (BuildError, OSError):
        return None
    pointer, i32, i64, f64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
    signatures: dict[str, list[Any]] = {
        "tf_norm": [*[pointer] * 3, i64, i32, f64, i32],
        "tf_norm_backward": [*[pointer] * 5, i64, i32, f64, i32],
        "tf_gate": [*[pointer] * 3, i64, i32],
        "tf_gate_backward": [*[pointer] * 5, i64, i32],
        "tf_attend": [*[pointer] * 3, i32, *[pointer] * 6, i32],
        "tf_attend_backward": [*[pointer] * 3, i32, *[pointer] * 10, i32],
        "tf_mixer": [pointer, f64, pointer, i32, *[pointer] * 5, i32],
        "tf_mixer_backward": [pointer, f64, pointer, i32, *[pointer] * 7, i32],
    }
    for name, arguments in signatures.items():
        getattr(lib, name).restype, getattr(lib, name).argtypes = None, arguments
    return lib


def usable(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels take `x` (..., D) and the weights that act on it: rows enough, D a multiple of sixteen,
    float32 on a CPU, and a compiler that works."""
    fits = x.device.type == "cpu" and x.shape[-1] % BLOCK == 0 and x.numel() >= MIN_ROWS * x.shape[-1]
    return fits and all(t.dtype == torch.float32 for t in (x, *weights)) and _library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) / rms(x) * weight (D,)."""
    apply: Callable[..., Tensor] = _Norm.apply
    return apply(x, weight, eps)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) for x (..., D), gate and up (M, D), down (D, M)."""
    apply: Callable[..., Tensor] = _SwiGLU.apply
    return apply(x, gate, up, down)


def mixer(rows: Tensor, weights: Sequence[Tensor], shape: MixerShape, bounds: Tensor | None = None) -> Tensor:
    """rows (B, L, z + x + B + C + dt), what in_proj gives -> (B, L, d_inner), what out_proj takes.

    With `bounds` (documents + 1,), int64 from 0 to B * L, each document between two of them is a sequence of its own.

    `weights`: taps (Ch, 1, K) and bias (Ch,) of the convolution, dt_bias, A_log and D (H,), weight of the gated norm.
    """
    apply: Callable[..., Tensor] = _Mixer.apply
    return apply(rows, shape, bounds, *weights)


def attention(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, bounds: Tensor | None = None) -> Tensor:
    """Causal attention of queries (B, L, H, P), turned by angles (L, P / 2) as `apply_rope` does, over keys, turned
    alike, and values (B, L, KVH, P) -> (B, L, H * P). P is a multiple of 32; `bounds` as for `mixer`."""
    apply: Callable[..., Tensor] = _Attention.apply
    return apply(q, k, v, angles, bounds)


def _call(name: str, *given: Tensor | float | Any) -> None:
    lib = _library()
    if lib is None:
        raise BuildError("the kernels for training are not there")
    arguments = [t.data_ptr() if isinstance(t, Tensor) else t for t in given]
    getattr(lib, name)(*arguments, torch.get_num_threads())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out = torch.empty_like(x)
        _call("tf_norm", x, weight, out, x.numel() // x.shape[-1], x.shape[-1], eps)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        dx, dweight = torch.empty_like(x), x.new_empty(-(-rows // NORM_ROWS), width)
        _call("tf_norm_backward", x, weight, dout.contiguous(), dx, dweight, rows, width, ctx.eps)
        return dx, dweight.sum(0), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gated, raised = F.linear(flat, gate), F.linear(flat, up)
        hidden = torch.empty_like(gated)
        _call("tf_gate", gated, raised, hidden, hidden.numel())
        ctx.save_for_backward(flat, gate, up, down, gated, raised)
        out = x.new_empty(x.shape)
        torch.mm(hidden, down.t(), out=out.view(flat.shape))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        flat, gate, up, down, gated, raised = ctx.saved_tensors
        flat_out = dout.reshape(flat.shape)
        draised = flat_out @ down
        dgated, hidden = torch.empty_like(gated), torch.empty_like(gated)
        _call("tf_gate_backward", gated, raised, draised, dgated, hidden, hidden.numel())
        dx = dout.new_empty(dout.shape)
        torch.mm(dgated, gate, out=dx.view(flat.shape)).addmm_(draised, up)
        return dx, dgated.t() @ flat, draised.t() @ flat, flat_out.t() @ hidden


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output and the logarithms of the softmax' sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, bounds: Tensor | None) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        batch, length, heads, width = q.shape
        sizes, bounds = (ctypes.c_int32 * 3)(heads, k.shape[2], width), _bounds(bounds, batch, length)
        cosines, sines = angles.cos().contiguous(), angles.sin().contiguous()
        out, log_sums = q.new_empty(batch, length, heads * width), q.new_empty(batch, heads, length)
        _call("tf_attend", sizes, cosines, sines, len(bounds) - 1, bounds, q, k, v, out, log_sums)
        ctx.save_for_backward(q, k, v, cosines, sines, bounds, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cosines, sines, bounds, out, log_sums = ctx.saved_tensors
        sizes = (ctypes.c_int32 * 3)(q.shape[2], k.shape[2], q.shape[3])
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = (q, k, v, out, log_sums, dout.contiguous(), dq, dk, dv)
        _call("tf_attend_backward", sizes, cosines, sines, len(bounds) - 1, bounds, *given)
        return dq, dk, dv, None, None


class _Mixer(torch.autograd.Function):
    """Keeps its input, the recurrence's output and the states at the starts of chunks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shape: MixerShape, bounds: Tensor | None, *weights: Tensor) -> Tensor:
        rows = rows.contiguous()
        batch, length, _ = rows.shape
        held = [weight.contiguous() for weight in weights]
        sizes = shape.sizes
        bounds = _bounds(bounds, batch, length)
        chunks = int((-(-bounds.diff() // sizes[5])).sum())
        y = rows.new_empty(batch, length, shape.heads * shape.head_dim)
        out, states = torch.empty_like(y), rows.new_empty(chunks * shape.heads, shape.d_state, shape.head_dim)
        _call("tf_mixer", sizes, shape.eps, _pointers(held), len(bounds) - 1, bounds, rows, y, out, states)
        ctx.save_for_backward(rows, y, states, bounds, *held)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, y, states, bounds, *held = ctx.saved_tensors
        shape: MixerShape = ctx.shape
        drows = torch.empty_like(rows)
        sums = rows.new_empty(len(bounds) - 1, sum(weight.numel() for weight in held))
        given = (rows, y, states, dout.contiguous(), drows, sums)
        _call("tf_mixer_backward", shape.sizes, shape.eps, _pointers(held), len(bounds) - 1, bounds, *given)
        parts = sums.sum(0).split([weight.numel() for weight in held])
        return drows, None, None, *(part.view(weight.shape) for part, weight in zip(parts, held, strict=True))


def _bounds(given: Tensor | None, batch: int, length: int) -> Tensor:
    """Where sequences begin and end among all rows: those given, or each row of the batch."""
    return torch.arange(batch + 1) * length if given is None else given.contiguous()


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
