"""One decoding step of attention: keys and values of a prompt are read once for all samples drawn from it.

A row's tokens lie in two places: those of its prompt, in memory that the rows of a block share, and its own, behind
them. Each place is cut into splits (arXiv 2311.01282); every (row, head, split) gives a maximum, a sum of weights and a
weighted sum of values, and the last kernel puts them together. Split sizes follow from lengths on the device, so that
one captured graph serves all lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

TOKENS = 64
"""Tokens that one pass of the inner loop reads."""
SHARED_ROWS = 16
"""Rows of one prompt that read its keys and values together."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which rows share which prompt, int64 throughout; every row stands in exactly one block.

    order (rows,): rows, those of a block together. first, count (blocks,): a block's place in it and its rows, at
    most SHARED_ROWS; count 0 for blocks that are not needed. length (blocks,): tokens of the prompt, 0 for none.
    address (layers, 2, blocks): where a layer's keys and its values (KVH, length, P) begin.
    """

    order: Tensor
    first: Tensor
    count: Tensor
    length: Tensor
    address: Tensor


def share(prefixes: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """order, first and count of `Blocks` for rows with these prompts, and each block's prompt (rows,), -1 for none.

    There are as many blocks as rows, the most that can be needed; the last ones may be empty.
    """
    rows = len(prefixes)
    order = np.argsort(prefixes, kind="stable")
    ordered = prefixes[order]
    first, count, which = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.full(rows, -1, np.int64)
    edges = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True]) if rows else np.zeros(1, np.int64)
    begins = np.concatenate([np.arange(a, b, SHARED_ROWS) for a, b in pairwise(edges)] or [edges[:0]])
    first[: len(begins)] = begins
    count[: len(begins)] = np.diff(np.r_[begins, rows])
    which[: len(begins)] = ordered[begins]
    return order, first, count, which


def operands(like: Tensor) -> tl.dtype:
    """The type in which tiles of `like` are multiplied: its own, but float32 in Triton's interpreter on the CPU, which
    would multiply the bits of bfloat16 numbers as integers."""
    wide = like.dtype == torch.float32 or like.device.type == "cpu"
    return tl.float32 if wide else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[like.dtype]


def rotate_and_append(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    slots: Tensor,
    position: Tensor,
    own: Tensor,
) -> Tensor:
    """Rotary embedding, and new keys and values into the slots' own memory; returns turned queries (rows, H, P).

    qkv (rows, (H + 2 KVH) * P), contiguous: queries, keys, values. keys, values (slots, KVH, capacity, P); row i writes
    at own[i] of slot slots[i], or nowhere from the capacity on. cosine, sine (positions, P / 2), row position[i] each.
    """
    _, kv_heads, capacity, head_dim = keys.shape
    rows, heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads
    queries = qkv.new_empty(rows, heads, head_dim)
    half = head_dim // 2
    _rotate[(rows, heads + 2 * kv_heads)](
        qkv, queries, keys, values, cosine, sine, slots, position, own,
        heads, kv_heads, capacity, half, triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return queries


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, own: Tensor, blocks: Blocks, layer: int, splits: int
) -> Tensor:
    """Attention of queries (rows, H, P) over the rows' prompts and their own first own[i] + 1 tokens -> (rows, H * P).

    layer: the row of `blocks.address`. splits: pieces that each of the two places is cut into.
    """
    _, kv_heads, capacity, head_dim = keys.shape
    rows, heads, _ = queries.shape
    sharing = heads // kv_heads
    parts = 2 * splits
    weighted = torch.empty(rows, heads, parts, head_dim, dtype=torch.float32, device=queries.device)
    largest = torch.empty(rows, heads, parts, dtype=torch.float32, device=queries.device)
    total = torch.empty_like(largest)
    out = queries.new_empty(rows, heads * head_dim)
    padded = triton.next_power_of_2(sharing)
    wide = max(triton.next_power_of_2(head_dim), 16)
    operand = operands(queries)
    precision = "ieee" if queries.dtype == torch.float32 else "tf32"
    shape = (heads, kv_heads, sharing, head_dim, splits)
    scale = head_dim**-0.5
    _attend_own[(rows, kv_heads, splits)](
        queries, keys, values, weighted, largest, total, slots, own, scale, capacity,
        *shape, max(padded, 16), wide, TOKENS, operand, precision, num_warps=4,
    )  # fmt: skip
    _attend_shared[(len(blocks.first), kv_heads, splits)](
        queries, keys, weighted, largest, total,
        blocks.order, blocks.first, blocks.count, blocks.length, *blocks.address[layer], scale,
        *shape, padded, SHARED_ROWS * padded, wide, TOKENS, operand, precision, num_warps=4 if padded <= 4 else 8,
    )  # fmt: skip
    _combine[(rows * heads,)](
        weighted, largest, total, out, head_dim, parts, triton.next_power_of_2(parts), wide, num_warps=1
    )
    return out


@triton.jit
def _rotate(
    qkv, queries, keys, values, cosine, sine, slots, position, own, H, KVH, capacity, half, BLOCK: tl.constexpr
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < half
    size = 2 * half
    line = qkv + (row * (H + 2 * KVH) + head) * size
    first, second = tl.load(line + i, mask=inside, other=0.0), tl.load(line + half + i, mask=inside, other=0.0)
    at, slot = tl.load(own + row), tl.load(slots + row).to(tl.int64)
    fits = inside & (at < capacity)
    if head >= H + KVH:
        place = ((slot * KVH + head - H - KVH) * capacity + at) * size
        tl.store(values + place + i, first.to(values.dtype.element_ty), mask=fits)
        tl.store(values + place + half + i, second.to(values.dtype.element_ty), mask=fits)
    else:
        turn = tl.load(position + row).to(tl.int64) * half
        cos = tl.load(cosine + turn + i, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sine + turn + i, mask=inside, other=0.0).to(tl.float32)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(qkv.dtype.element_ty), (b * cos + a * sin).to(qkv.dtype.element_ty)
        if head < H:
            place = (row * H + head) * size
            tl.store(queries + place + i, first, mask=inside)
            tl.store(queries + place + half + i, second, mask=inside)
        else:
            place = ((slot * KVH + head - H) * capacity + at) * size
            tl.store(keys + place + i, first.to(keys.dtype.element_ty), mask=fits)
            tl.store(keys + place + half + i, second.to(keys.dtype.element_ty), mask=fits)


@triton.jit
def _read(
    q, keys, values, start, stop, scale, largest, total, weighted, part,
    P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, mask,
):  # fmt: skip
    """Attends queries (BLOCK_M, BLOCK_P) to tokens [start, stop) of one head and stores what they give at `part`."""
    p = tl.arange(0, BLOCK_P)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for begin in range(start, stop, TOKENS):
        t = begin + tl.arange(0, TOKENS)
        at = t.to(tl.int64)[:, None] * P + p[None, :]
        there = (t < stop)[:, None] & (p < P)[None, :]
        k = tl.load(keys + at, mask=there, other=0.0).to(OPERAND)
        v = tl.load(values + at, mask=there, other=0.0).to(OPERAND)
        scores = tl.dot(q.to(OPERAND), tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((t < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - higher)
        w = tl.exp(scores - higher[:, None])
        sums = sums * shrink[:, None] + tl.dot(w.to(OPERAND), v, input_precision=PRECISION)
        weights = weights * shrink + tl.sum(w, 1)
        top = higher
    tl.store(largest + part, top, mask=mask)
    tl.store(total + part, weights, mask=mask)
    tl.store(weighted + part[:, None] * P + p[None, :], sums, mask=mask[:, None] & (p < P)[None, :])


@triton.jit
def _attend_own(
    queries, keys, values, weighted, largest, total, slots, own, scale, capacity,
    H, KVH, GQ, P: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    m, p = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    head = row * H + kv_head * GQ + m
    mask = m < GQ
    q = tl.load(queries + head[:, None] * P + p[None, :], mask=mask[:, None] & (p < P)[None, :], other=0.0)
    length = tl.minimum(tl.load(own + row).to(tl.int32) + 1, capacity)
    piece = tl.cdiv(tl.cdiv(length, S), TOKENS) * TOKENS
    start = split * piece
    stop = tl.minimum(start + piece, length)
    place = (tl.load(slots + row).to(tl.int64) * KVH + kv_head) * capacity * P
    part = head * (2 * S) + split
    _read(
        q, keys + place, values + place, start, stop, scale, largest, total, weighted, part,
        P, BLOCK_M, BLOCK_P, TOKENS, OPERAND, PRECISION, mask,
    )  # fmt: skip


@triton.jit
def _attend_shared(
    queries, keys, weighted, largest, total, order, first, count, lengths, key_address, value_address, scale,
    H, KVH, GQ, P: tl.constexpr, S: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.load(count + block).to(tl.int32)
    if rows > 0:
        m, p = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
        mask = (m // PADDED < rows) & (m % PADDED < GQ)
        row = tl.load(order + tl.load(first + block) + m // PADDED, mask=mask, other=0).to(tl.int64)
        head = row * H + kv_head * GQ + m % PADDED
        q = tl.load(queries + head[:, None] * P + p[None, :], mask=mask[:, None] & (p < P)[None, :], other=0.0)
        length = tl.load(lengths + block).to(tl.int32)
        piece = tl.cdiv(tl.cdiv(length, S), TOKENS) * TOKENS
        start = split * piece
        stop = tl.minimum(start + piece, length)
        kind = tl.pointer_type(keys.dtype.element_ty)
        place = kv_head.to(tl.int64) * length * P
        shared_keys = tl.load(key_address + block).to(kind) + place
        shared_values = tl.load(value_address + block).to(kind) + place
        part = head * (2 * S) + S + split
        _read(
            q, shared_keys, shared_values, start, stop, scale, largest, total, weighted, part,
            P, BLOCK_M, BLOCK_P, TOKENS, OPERAND, PRECISION, mask,
        )  # fmt: skip


@triton.jit
def _combine(weighted, largest, total, out, P, parts, PARTS: tl.constexpr, BLOCK_P: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    s, p = tl.arange(0, PARTS), tl.arange(0, BLOCK_P)
    held = s < parts
    top = tl.load(largest + at * parts + s, mask=held, other=float("-inf"))
    # A piece without tokens has -inf here and zeroes there.
    shrink = tl.exp(top - tl.max(top, 0))
    weights = tl.sum(tl.load(total + at * parts + s, mask=held, other=0.0) * shrink, 0)
    inside = held[:, None] & (p < P)[None, :]
    sums = tl.load(weighted + (at * parts + s)[:, None] * P + p[None, :], mask=inside, other=0.0)
    mean = tl.sum(sums * shrink[:, None], 0) / weights
    tl.store(out + at * P + p, mean.to(out.dtype.element_ty), mask=p < P)
