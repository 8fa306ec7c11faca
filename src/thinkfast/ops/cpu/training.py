"""Norm, SwiGLU, attention, the Mamba-2 mixer and whole halves of a layer for training on a CPU, by `train.cpp`.

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
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from thinkfast.ops.cpu.build import BuildError, build

BLOCK, MAX_CHUNK, MAX_TAPS = 16, 64, 4
MAX_WEIGHTS = 1 << 18
"""Numbers in the matrices of half a layer up to which they, and the sums of their gradients, fit into a core's second
level of cache. Then half a layer is one call; with more of them torch's products are better."""
PLAIN = (Tensor, nn.Parameter)
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
    def taken(self) -> int:
        """Positions that the kernels take at a time."""
        return min(max(self.chunk, BLOCK), MAX_CHUNK) // BLOCK * BLOCK


@cache
def _sizes(shape: MixerShape) -> Any:
    return _integers(shape.heads, shape.head_dim, shape.d_state, shape.groups, shape.taps, shape.taken)


@cache
def _integers(*numbers: int) -> Any:
    return (ctypes.c_int32 * len(numbers))(*numbers)


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
        "tf_mlp": [pointer, f64, pointer, i64, *[pointer] * 4, i32],
        "tf_mlp_backward": [pointer, f64, pointer, i64, *[pointer] * 6, i32],
        "tf_layer": [pointer, i32, f64, f64, pointer, i32, *[pointer] * 7, i32],
        "tf_layer_backward": [pointer, i32, f64, f64, pointer, i32, *[pointer] * 9, i32],
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
    float32 on a CPU, no shards of tensors, no graph for `torch.compile`, and a compiler that works."""
    if torch.compiler.is_compiling():
        return False
    fits = x.device.type == "cpu" and x.shape[-1] % BLOCK == 0 and x.numel() >= MIN_ROWS * x.shape[-1]
    return fits and all(t.dtype == torch.float32 and type(t) in PLAIN for t in (x, *weights)) and _library() is not None


def small(*matrices: Tensor) -> bool:
    """Whether the matrices of half a layer are few enough for one call."""
    whole = all(size % BLOCK == 0 for matrix in matrices for size in matrix.shape[1:])
    return whole and sum(matrix.numel() for matrix in matrices) <= MAX_WEIGHTS


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


@dataclass(frozen=True, slots=True)
class Half:
    """Half a layer: x + f(rms_norm(x)) with `eps` in the norm, where f is SwiGLU or, with a shape, the Mamba-2 mixer
    between its projections.

    Its weights: gate, up, down and the norm's, or in_proj, out_proj, the norm's and those of `mixer`. The matrices
    among them are `small`.
    """

    eps: float
    shape: MixerShape | None = None

    @property
    def weights(self) -> int:
        """How many there are."""
        return 4 if self.shape is None else 9

    def kept(self, x: Tensor, weights: Sequence[Tensor], bounds: Tensor) -> list[Tensor]:
        """Room for what the gradients need beside the input x (B, L, D); `bounds` as for `mixer`."""
        (batch, length, _), rows = x.shape, len(weights[0])
        if self.shape is None:
            return [x.new_empty(batch * length, rows), x.new_empty(batch * length, rows)]
        shape = self.shape
        chunks, made = (
            int((-(-bounds.diff() // shape.taken)).sum()),
            rows - shape.heads + -(-shape.heads // BLOCK) * BLOCK,
        )
        y = x.new_empty(batch, length, shape.heads * shape.head_dim)
        states = x.new_empty(chunks * shape.heads, shape.d_state, shape.head_dim)
        return [x.new_empty(batch, length, made), y, torch.empty_like(y), states]

    def call(self, back: str, x: Tensor, weights: Sequence[Tensor], bounds: Tensor, *given: Tensor) -> tuple[Any, ...]:
        """A kernel and what it is called with; `back` is "" or "_backward"."""
        width, held = x.shape[-1], _pointers(weights)
        if self.shape is None:
            return f"tf_mlp{back}", _integers(width, len(weights[0])), self.eps, held, x.numel() // width, x, *given
        sizes = _sizes(self.shape), width, self.eps, self.shape.eps
        return f"tf_layer{back}", *sizes, held, len(bounds) - 1, bounds, x, *given


def through(x: Tensor, halves: Sequence[Half], weights: Sequence[Tensor], bounds: Tensor | None = None) -> Tensor:
    """x (B, L, D) through halves of layers, one behind another; their weights, too, one behind another. `bounds` as for
    `mixer`."""
    apply: Callable[..., Tensor] = _Halves.apply
    bounds = _bounds(bounds, *x.shape[:2])
    if torch.is_grad_enabled():
        return apply(x, tuple(halves), bounds, *weights)
    place = 0
    for half in halves:  # one at a time, so that nothing is kept
        x = apply(x, (half,), bounds, *weights[place : place + half.weights])
        place += half.weights
    return x


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
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        _call("tf_norm_backward", x, weight, dout.contiguous(), dx, dweight, rows, width, ctx.eps)
        return dx, dweight, None


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
        sizes, bounds = _integers(heads, k.shape[2], width), _bounds(bounds, batch, length)
        cosines, sines = angles.cos().contiguous(), angles.sin().contiguous()
        out, log_sums = q.new_empty(batch, length, heads * width), q.new_empty(batch, heads, length)
        _call("tf_attend", sizes, cosines, sines, len(bounds) - 1, bounds, q, k, v, out, log_sums)
        ctx.save_for_backward(q, k, v, cosines, sines, bounds, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cosines, sines, bounds, out, log_sums = ctx.saved_tensors
        sizes = _integers(q.shape[2], k.shape[2], q.shape[3])
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
        bounds = _bounds(bounds, batch, length)
        chunks = int((-(-bounds.diff() // shape.taken)).sum())
        y = rows.new_empty(batch, length, shape.heads * shape.head_dim)
        out, states = torch.empty_like(y), rows.new_empty(chunks * shape.heads, shape.d_state, shape.head_dim)
        _call("tf_mixer", _sizes(shape), shape.eps, _pointers(held), len(bounds) - 1, bounds, rows, y, out, states)
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
        _call("tf_mixer_backward", _sizes(shape), shape.eps, _pointers(held), len(bounds) - 1, bounds, *given)
        return drows, None, None, *_cut(sums.sum(0), held)


def _bounds(given: Tensor | None, batch: int, length: int) -> Tensor:
    """Where sequences begin and end among all rows: those given, or each row of the batch."""
    return torch.arange(batch + 1) * length if given is None else given.contiguous()


class _Halves(torch.autograd.Function):
    """Keeps every half's input and what `Half.kept` names. All memory is there before the first kernel runs: between
    kernels, which leave nothing of Python in the caches, every line of it costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halves: tuple[Half, ...], bounds: Tensor, *weights: Tensor) -> Tensor:
        held, calls, saved = [weight.contiguous() for weight in weights], list[Any](), list[Tensor]()
        out, place = x.contiguous(), 0
        for half in halves:
            own, x = held[place : place + half.weights], out
            kept, out = half.kept(x, own, bounds), torch.empty_like(x)
            calls.append(half.call("", x, own, bounds, *kept, out))
            saved += [x, *kept]
            place += half.weights
        for call in calls:
            _call(*call)
        ctx.save_for_backward(*saved, *held)
        ctx.halves, ctx.bounds = halves, bounds
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        halves: tuple[Half, ...] = ctx.halves
        everything, place = ctx.saved_tensors, sum(half.weights for half in halves)
        saved, held = everything[:-place], everything[-place:]
        dout, calls, found = dout.contiguous(), list[Any](), list[tuple[Tensor, list[Tensor]]]()
        for half in reversed(halves):
            own, count = held[place - half.weights : place], 3 if half.shape is None else 5
            (x, *kept), saved = saved[-count:], saved[:-count]
            dx, sums = torch.empty_like(x), x.new_empty(sum(weight.numel() for weight in own))
            calls.append(half.call("_backward", x, own, ctx.bounds, *kept, dout, dx, sums))
            found.append((sums, own))
            dout, place = dx, place - half.weights
        for call in calls:
            _call(*call)
        return dout, None, None, *(gradient for part in reversed(found) for gradient in _cut(*part))


def _cut(sums: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that lie one behind another, in the shapes of their weights."""
    parts = torch.split(sums, [weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
