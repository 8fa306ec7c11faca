"""What computes a step: the native kernels, those for GPUs, or the decoder itself in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from thinkfast.engine.sampling import ERROR, LENGTH, STOP, draw
from thinkfast.engine.slots import Finished, SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.cache import AttentionCache, Cache, new_cache
from thinkfast.model.config import ATTENTION, MAMBA2
from thinkfast.model.decoder import Decoder
from thinkfast.model.layers import rope_frequencies
from thinkfast.ops.cpu.build import BuildError
from thinkfast.ops.cpu.native import NativeKept, NativeModel, NativePool, Shape
from thinkfast.ops.triton import runs, usable

KV_DTYPES = ("auto", "float32", "bfloat16")
AHEAD, IDLE = 16, 32  # steps of the native kernels in a row
FEW, SHORT = 4, 8
ENDS = ("", STOP, ERROR, LENGTH)  # of `collect`
BACKENDS = ("auto", "native", "triton", "torch")
Drawn = tuple[NDArray[np.int32], NDArray[np.float64]]


class Memory(Protocol):
    """What `slots` sequences of at most `capacity` tokens remember. A kept state belongs to the memory that made it."""

    slots: int
    capacity: int

    def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None] = ()) -> list[Kept]:
        """Feeds each prompt (possibly empty), behind a kept state where one is given, and keeps the state behind it."""

    def fork(self, kept: Kept, slot: int) -> None:
        """Copies a kept state into a slot."""

    def step(self, table: SlotTable, rows: NDArray[np.int32], logits: NDArray[np.float32] | None = None) -> Drawn:
        """Feeds the tokens of the slots in `rows` and draws the next ones; -1 where the logits are not finite.

        `logits` (rows, vocab), where given, receives the logits.
        """


@runtime_checkable
class Ahead(Protocol):
    """Memory that takes several steps without the host looking in between."""

    def run_ahead(self, table: SlotTable, rows: NDArray[np.int32], seconds: float) -> Drawn:
        """Tokens and log-probabilities, each (steps, rows), of as many steps as may be made within `seconds`, or one.

        NOT_DRAWN stands where a row took no step; what stands behind the end of a sample means nothing.
        """

    def interrupt(self, on: bool) -> None:
        """While on, steps are made one at a time: one that runs in another thread is the last of its row of steps."""


def decode(memory: Memory, table: SlotTable, rows: NDArray[np.int32], seconds: float) -> list[Finished]:
    """One step of the slots in `rows`, or several at once where the memory can: what they end."""
    if isinstance(memory, NativeMemory) and not table.stops:
        return memory.settle(table, rows, *memory.run_ahead(table, rows, seconds))
    if isinstance(memory, Ahead):
        return table.advance_all(rows, *memory.run_ahead(table, rows, seconds))
    return table.advance(rows, *memory.step(table, rows))


class Backend(Protocol):
    """Makes the memory that steps run in."""

    name: str
    kv_dtype: str

    def memory(self, slots: int, capacity: int) -> Memory:
        """Memory that may be given back by dropping it."""

    def fits(self, memory: Memory, capacity: int) -> bool:
        """Whether memory made earlier still serves."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The state behind `length` tokens, in the native kernels' pages or as a cache of one row."""

    length: int
    state: NativeKept | Cache


class NativeBackend:
    """The C++ kernels, with `torch.get_num_threads()` threads. Holds a copy of the weights, in float32 or bfloat16.

    weights: "float32", "bfloat16", or "auto": bfloat16 where that loses nothing, as with checkpoints stored in it.
    """

    name = "native"

    def __init__(self, model: Decoder, kv_dtype: str, weights: str = "auto") -> None:
        config, mamba = model.config, model.config.mamba
        if mamba is not None and mamba.kind != MAMBA2:
            raise BuildError(f"the kernels have no {mamba.title}")
        if config.qkv_bias or config.qk_norm:
            raise BuildError(f"the kernels have no {'QKV bias' if config.qkv_bias else 'QK norm'}")
        # Half the bytes a step, and wide enough for keys and values.
        self.kv_dtype = "float32" if kv_dtype == "float32" else "bfloat16"
        shape = Shape(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            attention=tuple(kind == ATTENTION for kind in config.layer_types),
            eps=config.rms_norm_eps,
        )
        if mamba is not None:
            sizes = (mamba.n_heads, mamba.head_dim, mamba.d_state, mamba.n_groups, mamba.d_conv)
            shape = replace(shape, mamba=sizes)
        tensors = {**model.state_dict(), "head": model.head_weight}
        frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.rotary_dim)
        half = weights == "bfloat16" or (weights == "auto" and all(map(_is_bfloat16, tensors.values())))
        self.weights = "bfloat16" if half else "float32"
        self.model = NativeModel(shape, tensors, frequency, half)

    def memory(self, slots: int, capacity: int) -> NativeMemory:
        return NativeMemory(self.model, slots, capacity, self.kv_dtype == "bfloat16", torch.get_num_threads())

    def fits(self, memory: Memory, capacity: int) -> bool:
        threads = memory.threads if isinstance(memory, NativeMemory) else 0
        return memory.capacity >= capacity and threads == torch.get_num_threads()


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    """Whether a tensor, if it is a matrix, holds nothing that bfloat16 would round."""
    return tensor.ndim != 2 or tensor.dtype == torch.bfloat16 or torch.equal(tensor.bfloat16().to(tensor.dtype), tensor)


class NativeMemory:
    """A pool of slots and, behind them, one lane a thread to prefill in."""

    def __init__(self, model: NativeModel, slots: int, capacity: int, half: bool, threads: int) -> None:
        self.slots, self.capacity, self.threads = slots, capacity, threads
        self._pool = NativePool(model, slots + threads, capacity, half, threads)
        self._interrupted = np.zeros(1, bool)

    def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None] = ()) -> list[Kept]:
        before = behind or [None] * len(prompts)
        kept = []
        for start in range(0, len(prompts), self.threads):
            together = prompts[start : start + self.threads]
            lanes = range(self.slots, self.slots + len(together))
            held = [0] * len(together)
            for at, state in enumerate(before[start : start + self.threads]):
                if state is not None:
                    self.fork(state, lanes[at])
                    held[at] = state.length
            self._pool.prefill(lanes, together, held)
            for lane, length, prompt in zip(lanes, held, together, strict=True):
                kept.append(Kept(length + len(prompt), self._pool.keep(lane, length + len(prompt))))
        return kept

    def fork(self, kept: Kept, slot: int) -> None:
        self.resume(kept, slot)

    def resume(self, kept: Kept, slot: int, shared: int | None = None) -> None:
        """`fork`, but of tokens behind the first `shared` the slot gets keys and values of its own."""
        if isinstance(kept.state, Cache):
            raise ValueError("a torch cache was given to the native backend")
        self._pool.resume(slot, kept.state, shared)

    def step(self, table: SlotTable, rows: NDArray[np.int32], logits: NDArray[np.float32] | None = None) -> Drawn:
        tokens, logprobs = self._burst(table, rows, 1, math.inf, logits)
        return tokens[0], logprobs[0]

    def run_ahead(self, table: SlotTable, rows: NDArray[np.int32], seconds: float) -> Drawn:
        """At most AHEAD steps: so many that at most 1 / IDLE of them fall behind the known ends of rows, whose slots
        somebody may wait for; and few where chains have been short so far, since any token may be their last. The
        kernels themselves look at the clock."""
        room, steps = table.room(rows), AHEAD
        if table.ends(rows).any():
            steps = min(AHEAD, max(FEW, int(table.count[rows].mean()) // SHORT))
        while steps > 1 and IDLE * np.maximum(steps - room, 0).sum() > steps * len(rows):
            steps -= 1
        return self._burst(table, rows, steps, seconds, None)

    def interrupt(self, on: bool) -> None:
        self._interrupted[0] = on

    def _burst(
        self,
        table: SlotTable,
        rows: NDArray[np.int32],
        steps: int,
        seconds: float,
        logits: NDArray[np.float32] | None,
    ) -> Drawn:
        columns = (table.token[rows], table.position[rows], table.key[rows], table.count[rows], table.way[rows])
        limits = (table.room(rows), table.ends(rows), table.eos)
        return self._pool.burst(rows, *columns, steps, *limits, seconds, self._interrupted, logits)

    def settle(
        self, table: SlotTable, rows: NDArray[np.int32], tokens: NDArray[np.int32], logprobs: NDArray[np.float64]
    ) -> list[Finished]:
        """`SlotTable.advance_all` in the kernels, where there are no stop sequences."""
        columns = (table.count, table.token, table.position, table.logprob)
        limits = (table.ends(rows), table.eos, table.limit)
        reasons = self._pool.collect(rows, tokens, logprobs, *limits, columns, table.history, table.history_logprob)
        finished = [Finished(int(rows[at]), ENDS[reasons[at]]) for at in np.flatnonzero(reasons)]
        for done in finished:
            table.active[done.slot] = False
        return finished


class TorchBackend:
    """`Decoder.forward` with a cache, on the device of the model."""

    name = "torch"

    def __init__(self, model: Decoder, kv_dtype: str) -> None:
        self.model = model
        weight = model.embed_tokens.weight
        self.dtype: torch.dtype = weight.dtype if kv_dtype == "auto" else getattr(torch, kv_dtype)
        self.kv_dtype = str(self.dtype).removeprefix("torch.")
        self.device = weight.device

    def memory(self, slots: int, capacity: int) -> TorchMemory:
        return TorchMemory(self.model, slots, capacity, self.dtype, self.device)

    def fits(self, memory: Memory, capacity: int) -> bool:
        return memory.capacity >= capacity


class TorchMemory:
    """One cache with a row a slot. Idle rows are computed along at position 0."""

    def __init__(self, model: Decoder, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.slots, self.capacity, self.dtype, self.device = model, slots, capacity, dtype, device
        self._cache = new_cache(model.config, slots, capacity, dtype, device)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None] = ()) -> list[Kept]:
        kept = []
        for prompt, before in zip(prompts, behind or [None] * len(prompts), strict=True):
            length = len(prompt) + (before.length if before is not None else 0)
            cache = new_cache(self.model.config, 1, max(length, 1), self.dtype, self.device)
            if before is not None:
                cache.copy_rows(_rows_of(before), torch.tensor([0]), torch.tensor([0]))
            if prompt:
                self.model.hidden(torch.tensor([list(prompt)], device=self.device), cache)
            kept.append(Kept(length, cache))
        return kept

    def fork(self, kept: Kept, slot: int) -> None:
        row = torch.tensor([slot], device=self.device)
        for layer in self._cache.layers:
            if isinstance(layer, AttentionCache):
                # A NaN left by an earlier sample would reach this one through a mask: 0 * NaN is NaN.
                layer.keys[slot], layer.values[slot] = 0, 0
        self._cache.copy_rows(_rows_of(kept), torch.zeros_like(row), row)

    @torch.inference_mode()
    def step(self, table: SlotTable, rows: NDArray[np.int32], logits: NDArray[np.float32] | None = None) -> Drawn:
        idle = torch.from_numpy(~table.active).to(self.device)
        for layer in self._cache.layers:
            if isinstance(layer, AttentionCache):
                layer.lengths.masked_fill_(idle, 0)
        tokens = torch.from_numpy(table.token.astype(np.int64)).to(self.device)
        out = self.model(tokens[:, None], self._cache)[:, 0].float().cpu().numpy()[rows]
        if logits is not None:
            logits[:] = out
        drawn, logprobs = np.empty(len(rows), np.int32), np.empty(len(rows), np.float64)
        for params, at in table.groups(rows):
            drawn[at], logprobs[at] = draw(out[at], table.key[rows[at]], table.count[rows[at]], params)
        return drawn, logprobs


def _rows_of(kept: Kept) -> Cache:
    if not isinstance(kept.state, Cache):
        raise ValueError("a native state was given to the torch backend")
    return kept.state


def open_backend(model: Decoder, backend: str = "auto", kv_dtype: str = "auto", weights: str = "auto") -> Backend:
    """`auto` takes the native kernels where the model is on the CPU and they can be compiled, the Triton kernels where
    it is on a GPU and they are there, else torch.

    weights: the native kernels' copy of the matrices, see `NativeBackend`.
    Raises BadInput for an unknown name, and for "native" or "triton" where the kernels cannot be had.
    """
    if backend not in BACKENDS:
        raise BadInput(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if kv_dtype not in KV_DTYPES:
        raise BadInput(f"kv_dtype is {kv_dtype!r}, expected one of {', '.join(KV_DTYPES)}")
    if weights not in KV_DTYPES:
        raise BadInput(f"weights is {weights!r}, expected one of {', '.join(KV_DTYPES)}")
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    if backend == "native" and not on_cpu:
        raise BadInput(f"backend 'native' needs a model on the cpu, this one is on {model.embed_tokens.weight.device}")
    device = model.embed_tokens.weight.device
    if backend == "triton" and not runs(device):
        raise BadInput(f"backend 'triton' needs a model on a gpu and the package triton, this model is on {device}")
    if backend == "triton" or (backend == "auto" and usable(device)):
        from thinkfast.engine.gpu import GpuBackend

        try:
            return GpuBackend(model, kv_dtype)
        except ValueError as error:
            if backend == "triton":
                raise BadInput(f"backend 'triton': {error}") from error
    if backend == "torch" or not on_cpu:
        return TorchBackend(model, kv_dtype)
    try:
        return NativeBackend(model, kv_dtype, weights)
    except BuildError as error:
        if backend == "native":
            raise BadInput(f"backend 'native': {error}") from error
        return TorchBackend(model, kv_dtype)
