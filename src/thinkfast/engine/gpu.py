"""The GPU back end: a whole decoding step of Triton kernels and matrix products, captured in one CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from thinkfast.engine.backends import Drawn, Kept
from thinkfast.engine.slots import SlotTable
from thinkfast.model.attention import Attention
from thinkfast.model.cache import AttentionCache, Cache, MambaCache, new_cache
from thinkfast.model.decoder import Block, Decoder
from thinkfast.model.mamba2 import Mamba2
from thinkfast.ops.triton.attention import Blocks, attend, rotate_and_append, share
from thinkfast.ops.triton.mixer import States, StepWeights, mamba_step, new_states
from thinkfast.ops.triton.pointwise import add_norm, swiglu
from thinkfast.ops.triton.sampling import Streams, draw

RING = 8
AHEAD = 16
"""Steps that one burst takes without the host looking at their tokens."""
PROGRAMS = 1056
"""Programs that fill the largest GPUs, eight for each of 132 multiprocessors: below that, attention is split."""
MAX_SPLITS = 16


class GpuBackend:
    """Holds packed copies of the weights that are read together: queries with keys and values, gate with up.

    state_dtype: of recurrent states, "float32" or "bfloat16"; keys and values have the model's dtype with kv_dtype
    "auto". On tensors in main memory the same kernels run in Triton's interpreter: for tests.
    Raises ValueError for a model whose mixers have no kernel.
    """

    name = "triton"

    def __init__(self, model: Decoder, kv_dtype: str = "auto", state_dtype: str = "float32", ring: int = RING) -> None:
        weight = model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.dtype: torch.dtype = weight.dtype if kv_dtype == "auto" else getattr(torch, kv_dtype)
        self.kv_dtype = str(self.dtype).removeprefix("torch.")
        self.state_dtype: torch.dtype = getattr(torch, state_dtype)
        self.ring = ring
        with torch.no_grad():
            self.layers = [_pack(block) for block in model.layers if isinstance(block, Block)]

    def memory(self, slots: int, capacity: int) -> GpuMemory:
        return GpuMemory(self, slots, capacity, capacity)

    def fits(self, memory: object, capacity: int) -> bool:
        return isinstance(memory, GpuMemory) and memory.capacity >= capacity


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block: the first matrix of its mixer (qkv or in_proj), its last, and its MLP. `step`: of a Mamba layer."""

    block: Block
    first: Tensor
    last: Tensor
    gate_up: Tensor
    step: StepWeights | None


def _pack(block: Block) -> _Layer:
    mixer, mlp = block.mixer, block.mlp
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    if isinstance(mixer, Attention):
        qkv = torch.cat([mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight])
        return _Layer(block, qkv, mixer.o_proj.weight, gate_up, None)
    if not isinstance(mixer, Mamba2) or mixer.conv1d.bias is None:
        raise ValueError(f"there is no kernel for {type(mixer).__name__}")
    step = StepWeights(
        taps=mixer.conv1d.weight.squeeze(1).t().contiguous(),
        bias=mixer.conv1d.bias,
        dt_bias=mixer.dt_bias.float(),
        A=-torch.exp(mixer.A_log.float()),
        D=mixer.D.float(),
        norm=mixer.norm.weight,
        groups=mixer.shape.n_groups,
        eps=mixer.norm.eps,
    )
    return _Layer(block, mixer.in_proj.weight, mixer.out_proj.weight, gate_up, step)


@dataclass(slots=True)
class _Rows:
    """What a step reads for its rows, on the device: the integers of `names` as rows of one matrix, and the prompts."""

    numbers: Tensor
    heats: Tensor
    address: Tensor
    tokens: Tensor
    logprobs: Tensor
    tick: Tensor

    names = ("slot", "token", "position", "own", "key", "count", "top_k", "order", "first", "rows", "length")

    def __getitem__(self, name: str) -> Tensor:
        return self.numbers[self.names.index(name)]


class GpuMemory:
    """Preallocated slots: states, convolution inputs, and keys and values of `room` own tokens each.

    The keys and values of a prompt stay where its prefill left them and are read from there by all its samples.

    One more slot than asked for takes what the padding rows of a batch write.
    """

    def __init__(self, backend: GpuBackend, slots: int, capacity: int, room: int) -> None:
        self.backend, self.slots, self.capacity, self.room = backend, slots, capacity, room
        config, device = backend.model.config, backend.device
        self._states: dict[int, States] = {}
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(backend.layers):
            if layer.step is None:
                shape = (slots + 1, config.num_kv_heads, room, config.head_dim)
                keys, values = (torch.zeros(shape, dtype=backend.dtype, device=device) for _ in range(2))
                self._kv[index] = keys, values
            elif config.mamba is not None:
                sizes = (config.mamba.head_dim, config.mamba.d_state, backend.ring)
                self._states[index] = new_states(slots + 1, layer.step, *sizes, backend.state_dtype, layer.first.dtype)
        # A row that ends within a burst runs on to its end.
        self._turns = _turns(backend.model, capacity + AHEAD) if self._kv else None
        self._before = np.zeros(slots, np.int64)
        self._prompt = np.full(slots, -1, np.int64)  # the key in `_prompts` of what a slot was forked from
        self._prompts: dict[int, Kept] = {}
        self._waiting: dict[int, Kept] = {}
        self._rows: dict[int, _Rows] = {}
        self._pace, self._alone = 0.0, False
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        # One room for all graphs: they never run at the same time, and what they leave is copied out.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None] = ()) -> list[Kept]:
        """Feeds each prompt (possibly empty), behind a kept state where one is given, and keeps the state behind it."""
        backend, kept = self.backend, []
        for prompt, before in zip(prompts, behind or [None] * len(prompts), strict=True):
            length = len(prompt) + (0 if before is None else before.length)
            cache = new_cache(backend.model.config, 1, max(length, 1), backend.dtype, backend.device)
            if before is not None:
                first = torch.zeros(1, dtype=torch.int64, device=backend.device)
                cache.copy_rows(_cache_of(before), first, first)
            if prompt:
                backend.model.hidden(torch.tensor([list(prompt)], device=backend.device), cache)
            kept.append(Kept(length, cache))
        return kept

    def fork(self, kept: Kept, slot: int) -> None:
        """Copies a kept state into a slot; its keys and values are only referred to."""
        _cache_of(kept)
        old = int(self._prompt[slot])
        self._before[slot], self._prompt[slot] = kept.length, id(kept)
        self._prompts[id(kept)] = self._waiting[slot] = kept
        if not (self._prompt == old).any():
            self._prompts.pop(old, None)

    @torch.inference_mode()
    def step(self, table: SlotTable, rows: NDArray[np.int32], logits: NDArray[np.float32] | None = None) -> Drawn:
        """Feeds the tokens of the slots in `rows` and draws the next ones; -1 where the logits are not finite."""
        if logits is not None:
            held = self._load(table, rows)
            logits[:] = self._compute(held)[: len(rows)].float().cpu().numpy()
            held.tick.zero_()
        tokens, logprobs = self.burst(table, rows, 1)
        return tokens[0], logprobs[0]

    def run_ahead(self, table: SlotTable, rows: NDArray[np.int32], seconds: float) -> Drawn:
        """As many steps as may be made within `seconds`, at least one and at most AHEAD, and none that no row needs."""
        left = max(table.params[slot].max_tokens - int(table.count[slot]) for slot in rows.tolist())
        in_time = seconds / self._pace if self._pace else 1.0
        steps = 1 if self._alone else int(max(min(AHEAD, left, in_time), 1))
        start = time.perf_counter()
        drawn = self.burst(table, rows, steps)
        self._pace = (time.perf_counter() - start) / steps
        return drawn

    def interrupt(self, on: bool) -> None:
        self._alone = on

    @torch.inference_mode()
    def burst(self, table: SlotTable, rows: NDArray[np.int32], steps: int = AHEAD) -> Drawn:
        """`steps` (at most AHEAD) steps in a row, each fed with what the one before has drawn, seen by the host only at
        their end: tokens and log-probabilities, each (steps, rows)."""
        held = self._load(table, rows)
        cut = any((params.top_k > 0) or (params.top_p < 1) for params, _ in table.groups(rows))
        for _ in range(steps):
            self._advance(held, cut)
        count = len(rows)
        tokens = held.tokens[:steps].cpu().numpy()[:, :count].astype(np.int32)
        return tokens, held.logprobs[:steps].cpu().numpy()[:, :count]

    def _load(self, table: SlotTable, rows: NDArray[np.int32]) -> _Rows:
        """Copies what waits in `fork` into its slots, and the columns of `rows` to the device."""
        self._settle()
        size = self._bucket(len(rows))
        if size not in self._rows:
            self._rows[size] = self._new_rows(size)
        held = self._rows[size]
        which = np.full(size, -1, np.int64)
        which[: len(rows)] = self._prompt[rows]
        order, first, count, shown = share(which)
        there, at_block = np.unique(shown, return_inverse=True)
        prompts = [self._prompts.get(key) for key in there.tolist()]
        lengths = np.array([0 if kept is None else kept.length for kept in prompts], np.int64)
        position = table.position[rows]
        numbers = np.zeros((len(_Rows.names), size), np.int64)
        numbers[0] = self.slots
        columns = (rows, table.token[rows], position, position - self._before[rows], table.key[rows].view(np.int64))
        for line, column in enumerate((*columns, table.count[rows])):
            numbers[line, : len(rows)] = column
        heats = np.ones((2, size))
        for params, at in table.groups(rows):
            places = np.arange(len(rows))[at]
            heats[0, places], heats[1, places], numbers[6, places] = params.temperature, params.top_p, params.top_k
        numbers[7:] = order, first, count, lengths[at_block]
        held.numbers.copy_(torch.from_numpy(numbers))
        held.heats.copy_(torch.from_numpy(heats))
        if self._kv:
            address = np.zeros((len(self._kv), 2, len(there)), np.int64)
            for place, kept in enumerate(prompts):
                for row, layer in enumerate(self._kv):
                    cache = None if kept is None else _cache_of(kept).layers[layer]
                    if isinstance(cache, AttentionCache):
                        address[row, :, place] = cache.keys.data_ptr(), cache.values.data_ptr()
            held.address.copy_(torch.from_numpy(address[:, :, at_block]))
        held.tick.zero_()
        return held

    def _settle(self) -> None:
        """Writes forked states into their slots, all slots of one prompt at once."""
        together: dict[int, tuple[Kept, list[int]]] = {}
        for slot, kept in self._waiting.items():
            together.setdefault(id(kept), (kept, []))[1].append(slot)
        for kept, slots in together.values():
            places = torch.tensor(slots, device=self.backend.device)
            for index, states in self._states.items():
                cache = _cache_of(kept).layers[index]
                if isinstance(cache, MambaCache):
                    states.start(places, cache.conv[0], cache.state[0])
        self._waiting = {}

    def _bucket(self, rows: int) -> int:
        """The number of rows that is computed: a power of two up to 64, above that a multiple of 64."""
        if self.backend.device.type == "cpu":
            return rows
        return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64

    def _new_rows(self, size: int) -> _Rows:
        device = self.backend.device
        numbers = torch.zeros(len(_Rows.names), size, dtype=torch.int64, device=device)
        numbers[0] = self.slots
        return _Rows(
            numbers,
            torch.ones(2, size, dtype=torch.float64, device=device),
            torch.zeros(max(len(self._kv), 1), 2, size, dtype=torch.int64, device=device),
            torch.zeros(AHEAD, size, dtype=torch.int64, device=device),
            torch.zeros(AHEAD, size, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def _advance(self, held: _Rows, cut: bool) -> None:
        """One step, as a graph on a GPU."""
        if self.backend.device.type == "cpu":
            self._draw(held, cut)
            return
        key = (held.numbers.shape[1], cut)
        if key not in self._graphs:
            self._graphs[key] = self._capture(held, cut)
        self._graphs[key].replay()

    def _capture(self, held: _Rows, cut: bool) -> torch.cuda.CUDAGraph:
        """Records a step. It first runs once, to compile, with every row in the slot that nobody reads."""
        numbers = held.numbers.clone()
        held.numbers.zero_()
        held["slot"].fill_(self.slots)
        held["order"].copy_(torch.arange(numbers.shape[1], device=numbers.device))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._draw(held, cut)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._draw(held, cut)
        held.numbers.copy_(numbers)
        held.tick.zero_()
        return graph

    def _draw(self, held: _Rows, cut: bool) -> None:
        """One step: logits, tokens, and everything moved on to the next."""
        logits = self._compute(held)
        streams = Streams(held["key"], held["count"], held.heats[0], held["top_k"], held.heats[1])
        tokens, logprobs = draw(logits, streams, cut)
        held.tokens.index_copy_(0, held.tick, tokens[None])
        held.logprobs.index_copy_(0, held.tick, logprobs[None])
        held["token"].copy_(tokens.clamp(min=0))
        for name in ("position", "own", "count"):
            held[name].add_(1)
        held.tick.add_(1)

    def _compute(self, held: _Rows) -> Tensor:
        """Logits (rows, vocab) of the next tokens; keys, values and states are brought up to date."""
        model, eps = self.backend.model, self.backend.model.config.rms_norm_eps
        slots, own = held["slot"], held["own"]
        blocks = Blocks(held["order"], held["first"], held["rows"], held["length"], held.address)
        x, delta = F.embedding(held["token"], model.embed_tokens.weight), None
        attention = 0
        for index, layer in enumerate(self.backend.layers):
            u = F.linear(add_norm(x, delta, layer.block.input_layernorm.weight, eps), layer.first)
            if layer.step is not None:
                mixed = mamba_step(u, layer.step, self._states[index], slots, own)
            elif self._turns is not None:
                keys, values = self._kv[index]
                queries = rotate_and_append(u, keys, values, *self._turns, slots, held["position"], own)
                splits = self._splits(len(slots) * keys.shape[1])
                mixed = attend(queries, keys, values, slots, own, blocks, attention, splits)
                attention += 1
            delta = F.linear(mixed, layer.last)
            u = F.linear(add_norm(x, delta, layer.block.post_attention_layernorm.weight, eps), layer.gate_up)
            delta = F.linear(swiglu(u), layer.block.mlp.down_proj.weight)
        return F.linear(add_norm(x, delta, model.norm.weight, eps), model.head_weight)

    def _splits(self, programs: int) -> int:
        """Pieces that keys and values are cut into, so that few rows still fill the machine."""
        if self.backend.device.type == "cpu":
            return 2
        return min(max(1 << (PROGRAMS // max(programs, 1)).bit_length() - 1, 1), MAX_SPLITS)


def _cache_of(kept: Kept) -> Cache:
    if not isinstance(kept.state, Cache):
        raise ValueError("a native state was given to the GPU back end")
    return kept.state


def _turns(model: Decoder, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, head_dim / 2) of the rotary embedding, rounded as `apply_rope` rounds them."""
    mixer = next(block.mixer for block in model.layers if isinstance(block.mixer, Attention))
    angle = torch.arange(positions, device=mixer.frequency.device)[:, None].float() * mixer.frequency
    dtype = model.embed_tokens.weight.dtype
    return torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)
