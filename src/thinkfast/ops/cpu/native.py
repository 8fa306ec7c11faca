"""Python's side of the C interface in `decode.cpp`: a packed model and a pool of slots."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinkfast.ops.cpu.build import BuildError, build

ATTENTION_TENSORS = (
    "input_layernorm.weight",
    "mixer.q_proj.weight",
    "mixer.k_proj.weight",
    "mixer.v_proj.weight",
    "mixer.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
MAMBA_TENSORS = (
    "input_layernorm.weight",
    "mixer.in_proj.weight",
    "mixer.conv1d.weight",
    "mixer.conv1d.bias",
    "mixer.A_log",
    "mixer.D",
    "mixer.dt_bias",
    "mixer.norm.weight",
    "mixer.out_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
BRIEF = ("tf_collect", "tf_resume", "tf_clear", "tf_sizes")
MAX_TAPS = 64
PAGE_TOKENS = 32
COLUMNS = tuple(map(np.dtype, (np.int32, np.int32, np.int32, np.uint64, np.int64)))  # of a step


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; the Mamba ones are 0 (groups 1) where it has no Mamba layer."""

    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    attention: tuple[bool, ...]
    eps: float
    mamba: tuple[int, int, int, int, int] = (0, 0, 0, 1, 1)  # heads, head_dim, state, groups, taps


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises BuildError where they cannot be compiled or loaded."""
    path = build()
    try:
        lib, brief = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error
    pointer, i32, i64, f64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "tf_model_new": (pointer, [pointer, f64, i32, pointer, pointer]),
        "tf_model_free": (None, [pointer]),
        "tf_pool_new": (pointer, [pointer, i32, i32, i32, i32, i64, pointer, pointer]),
        "tf_pool_free": (None, [pointer]),
        "tf_step": (i32, [pointer, i32, *[pointer] * 6, i32, *[pointer] * 3, f64, *[pointer] * 4]),
        "tf_collect": (None, [i32, i32, *[pointer] * 6, i32, *[pointer] * 7]),
        "tf_prefill": (i32, [pointer, i32, *[pointer] * 4]),
        "tf_keep": (pointer, [pointer, i32, i32]),
        "tf_resume": (i32, [pointer, i32, pointer, i32]),
        "tf_kept_bytes": (i64, [pointer, pointer, pointer]),
        "tf_kept_free": (None, [pointer, pointer]),
        "tf_clear": (None, [pointer, i32]),
        "tf_sizes": (None, [pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        # What takes microseconds keeps Python's lock: to get it back behind another thread can take far longer.
        function = getattr(brief if name in BRIEF else lib, name)
        function.restype, function.argtypes = result, arguments
        setattr(lib, name, function)
    return lib


def _address(array: NDArray[Any]) -> int:
    """`array.ctypes.data` at a third of its time, which counts in a step of a small model."""
    address: int = array.__array_interface__["data"][0]
    return address


class NativeModel:
    """A packed copy of a decoder's weights: matrices in bfloat16 where `half`, else float32, the rest in float32.

    `tensors` has the names of `Decoder.state_dict()` (`head` for the output projection, which may be tied).
    Raises BuildError where the kernels cannot be had, MemoryError where the copy does not fit.
    """

    def __init__(
        self, shape: Shape, tensors: Mapping[str, Tensor], frequency: Tensor | None, half: bool = False
    ) -> None:
        self._lib = library()
        if shape.mamba[4] > MAX_TAPS:
            raise BuildError(f"the kernels take convolutions of at most {MAX_TAPS} taps, got {shape.mamba[4]}")
        self.shape, self.half = shape, half
        self.frequency = torch.zeros(shape.head_dim // 2) if frequency is None else frequency.float().cpu()
        names = ["embed_tokens.weight", "norm.weight", "head"]
        for index, attention in enumerate(shape.attention):
            names += [f"layers.{index}.{name}" for name in (ATTENTION_TENSORS if attention else MAMBA_TENSORS)]
        held = [tensors[name].detach().to("cpu", torch.float32).contiguous() for name in names]
        pointers = (ctypes.c_void_p * len(held))(*[tensor.data_ptr() for tensor in held])
        sizes = (shape.vocab, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim)
        numbers = (ctypes.c_int64 * 12)(*sizes, len(shape.attention), *shape.mamba)
        kinds = (ctypes.c_int32 * max(len(shape.attention), 1))(*map(int, shape.attention))
        self._handle = self._lib.tf_model_new(numbers, shape.eps, int(half), kinds, pointers)
        if not self._handle:
            raise MemoryError("the packed weights do not fit into memory")
        weakref.finalize(self, self._lib.tf_model_free, self._handle)


class NativeKept:
    """The state behind a prompt. Its whole pages of keys and values are shared with the samples drawn from it."""

    def __init__(self, pool: NativePool, handle: int, length: int) -> None:
        self.pool, self.handle, self.length = pool, handle, length
        # The callback holds the pool, which therefore outlives the state.
        weakref.finalize(self, _drop, pool, handle)

    @property
    def nbytes(self) -> int:
        """Bytes it takes; those of whole pages are shared with the samples drawn from it."""
        size: int = self.pool._lib.tf_kept_bytes(self.pool._handle, self.handle, None)
        return size

    def contents(self) -> NDArray[np.uint8]:
        """What it holds, page by page, then the Mamba states."""
        held = np.empty(self.nbytes, np.uint8)
        self.pool._lib.tf_kept_bytes(self.pool._handle, self.handle, _address(held))
        return held


def _drop(pool: NativePool, handle: int) -> None:
    pool._lib.tf_kept_free(pool._handle, handle)


class NativePool:
    """Memory for `slots` sequences of at most `capacity` tokens and the threads that decode them.

    Keys and values are bfloat16 where `half`, else float32, in pages of `PAGE_TOKENS` tokens; Mamba states are float32.
    Memory is taken when touched. `pages`: how many there may be at most, kept prompts included; None for no limit.
    """

    def __init__(
        self, model: NativeModel, slots: int, capacity: int, half: bool, threads: int, pages: int | None = None
    ) -> None:
        self._lib, self._model = model._lib, model
        self.slots, self.capacity, self.half, self.threads = slots, capacity, half, threads
        angle = torch.arange(capacity)[:, None].float() * model.frequency
        cosines, sines = torch.cos(angle).contiguous(), torch.sin(angle).contiguous()
        self._handle = self._lib.tf_pool_new(
            model._handle, slots, capacity, int(half), threads, pages or 0, cosines.data_ptr(), sines.data_ptr()
        )
        if not self._handle:
            raise MemoryError(f"{slots} slots of {capacity} tokens do not fit into memory")
        weakref.finalize(self, self._lib.tf_pool_free, self._handle)

    def step(
        self,
        slots: NDArray[np.int32],
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        keys: NDArray[np.uint64],
        counters: NDArray[np.int64],
        temperature: float,
        top_k: int,
        top_p: float,
        logits: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Feeds tokens (n,) at their positions to distinct slots; returns the drawn tokens and their log-probabilities.

        A token of -1 marks a row whose logits are not finite. `logits` (n, vocab), where given, receives the logits.
        Raises MemoryError where no page is left; then nothing has been fed.
        """
        one = np.ones(len(slots), np.int32)
        ways = np.tile(np.array([temperature, top_p, top_k], np.float64), (len(slots), 1))
        out, logprobs = self.burst(slots, tokens, positions, keys, counters, ways, 1, one, logits=logits)
        return out[0], logprobs[0]

    def burst(
        self,
        slots: NDArray[np.int32],
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        keys: NDArray[np.uint64],
        counters: NDArray[np.int64],
        ways: NDArray[np.float64],
        steps: int,
        rooms: NDArray[np.int32],
        ends: NDArray[np.bool_] | None = None,
        eos: NDArray[np.bool_] | None = None,
        seconds: float = math.inf,
        interrupted: NDArray[np.bool_] | None = None,
        logits: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """`step`, at most `steps` times in a row: tokens and log-probabilities, each (steps, n).

        Row i draws with temperature, top_p and top_k of ways[i], at most rooms[i] tokens (1 or more); where ends[i] it
        draws none behind one that `eos` (vocab) marks. No row begins a step but the first once `seconds` are over or
        the one value of `interrupted` is true, which another thread may set. NOT_DRAWN stands where nothing was drawn.
        `logits` receives those of each row's last step.
        """
        count = len(slots)
        out, logprobs = np.empty((steps, count), np.int32), np.empty((steps, count), np.float64)
        ends = np.zeros(count, bool) if ends is None else ends
        eos = np.zeros(self._model.shape.vocab, bool) if eos is None else eos
        arrays: tuple[NDArray[Any], ...] = (slots, tokens, positions, keys, counters)
        for array, kind in zip((*arrays, rooms, ends), (*COLUMNS, np.dtype(np.int32), np.dtype(bool)), strict=True):
            if array.dtype != kind or len(array) != count or not array.flags.c_contiguous:
                raise ValueError(f"expected {count} contiguous {kind}, got {len(array)} {array.dtype}")
        if ways.shape != (count, 3) or ways.dtype != np.float64 or not ways.flags.c_contiguous:
            raise ValueError(f"expected contiguous float64 ({count}, 3), got {ways.dtype} {ways.shape}")
        if logits is not None and (logits.shape != (count, self._model.shape.vocab) or logits.dtype != np.float32):
            raise ValueError(f"logits must be float32 ({count}, {self._model.shape.vocab})")
        given = [_address(array) for array in (*arrays, ways)]
        limits = [_address(array) for array in (rooms, ends, eos)]
        flag = None if interrupted is None else _address(interrupted)
        found = [_address(out), _address(logprobs), None if logits is None else _address(logits)]
        self._check(self._lib.tf_step(self._handle, count, *given, steps, *limits, seconds, flag, *found))
        return out, logprobs

    def collect(
        self,
        slots: NDArray[np.int32],
        tokens: NDArray[np.int32],
        logprobs: NDArray[np.float64],
        ends: NDArray[np.bool_],
        eos: NDArray[np.bool_],
        limits: NDArray[np.int64],
        columns: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.float64]],
        history: NDArray[np.int32],
        scores: NDArray[np.float64],
    ) -> NDArray[np.int8]:
        """Puts down in place what `burst` has drawn, until each sample's end; returns why each has ended (n).

        By slot: limits (tokens at most), columns (counts, last tokens, positions, sums of log-probabilities), history
        and scores (slots, width). Where ends[i] a token that `eos` marks ends a sample and is not counted. 0: goes on,
        1: that, 2: logits that were not finite, 3: its limit.
        """
        steps, n = tokens.shape
        reasons = np.empty(n, np.int8)
        given = [_address(array) for array in (slots, tokens, logprobs, ends, eos, limits)]
        kept = [_address(array) for array in (*columns, history, scores, reasons)]
        self._lib.tf_collect(n, steps, *given, history.shape[1], *kept)
        return reasons

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], starts: Sequence[int] | None = None
    ) -> None:
        """Feeds prompts[i] to slots[i] from position starts[i] on, by default 0. Raises MemoryError as `step` does."""
        offsets = np.zeros(len(prompts) + 1, np.int64)
        np.cumsum([len(prompt) for prompt in prompts], out=offsets[1:])
        ids = np.fromiter((token for prompt in prompts for token in prompt), np.int32, int(offsets[-1]))
        rows = np.asarray(slots, np.int32)
        first = np.zeros(len(rows), np.int32) if starts is None else np.asarray(starts, np.int32)
        given = [_address(array) for array in (rows, first, offsets, ids)]
        self._check(self._lib.tf_prefill(self._handle, len(prompts), *given))

    def keep(self, slot: int, length: int) -> NativeKept:
        """What a slot remembers after `length` tokens. Raises MemoryError where no page is left."""
        handle = self._lib.tf_keep(self._handle, slot, length)
        self._check(not handle)
        return NativeKept(self, handle, length)

    def resume(self, slot: int, kept: NativeKept, shared: int | None = None) -> None:
        """Makes a slot go on from a kept state, sharing the pages of its first `shared` tokens, by default of all.

        Raises MemoryError where no page is left.
        """
        if kept.pool is not self:
            raise ValueError("a kept state belongs to the pool that made it")
        self._check(self._lib.tf_resume(self._handle, slot, kept.handle, kept.length if shared is None else shared))

    def clear(self, slot: int) -> None:
        """Gives the pages of a slot back."""
        self._lib.tf_clear(self._handle, slot)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: the keys and values of `PAGE_TOKENS` tokens in all attention layers."""
        return self._sizes()[0]

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot beside its pages: its Mamba states."""
        return self._sizes()[1]

    @property
    def pages_used(self) -> int:
        """Pages that slots and kept states hold at the moment."""
        return self._sizes()[2]

    def _sizes(self) -> tuple[int, int, int]:
        sizes = (ctypes.c_int64 * 3)()
        self._lib.tf_sizes(self._handle, sizes)
        return sizes[0], sizes[1], sizes[2]

    def _check(self, full: int) -> None:
        if full:
            raise MemoryError(f"no page is left: {self.pages_used} of {PAGE_TOKENS} tokens are in use")
