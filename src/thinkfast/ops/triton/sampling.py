"""Drawing tokens on the device, from the same random numbers as `thinkfast.engine.sampling`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Streams:
    """Who draws in which row: key and count (rows,) int64 (the bits of the sample's 64-bit key, and tokens drawn so
    far), temperature and top_p (rows,) float64, top_k (rows,) int64."""

    key: Tensor
    count: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor


def draw(logits: Tensor, streams: Streams, cut: bool = False) -> tuple[Tensor, Tensor]:
    """One token (rows,) int64 and its log-probability (rows,) float64 for each row of logits (rows, vocab), contiguous.

    As `thinkfast.engine.sampling.draw`: by inverting the cumulative distribution in order of ids, -1 and NaN for a row
    with a NaN or without a finite maximum. Sums of 1024 weights are taken in float32, everything else in float64, so
    that a token differs from that oracle's only where a random number falls within 1e-6 of a boundary between two.
    top_k and top_p count only with `cut`, which sorts every row.
    """
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    shown = _cut(logits, streams) if cut else logits
    parts = torch.empty(4, rows, blocks, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float64, device=logits.device)
    _tally[(rows, blocks)](logits, shown, streams.temperature, parts, vocab, rows * blocks, BLOCK, cut, num_warps=4)
    _pick[(rows,)](
        logits, shown, streams.temperature, streams.key, streams.count, parts, tokens, logprobs,
        vocab, blocks, rows * blocks, triton.next_power_of_2(blocks), BLOCK, num_warps=4,
    )  # fmt: skip
    return tokens, logprobs


def _cut(logits: Tensor, streams: Streams) -> Tensor:
    """The logits with -inf for what top_k and top_p drop; larger logits go first, among equals smaller ids."""
    vocab = logits.shape[1]
    ordered, order = logits.double().sort(dim=1, descending=True, stable=True)
    heat = torch.where(streams.temperature > 0, streams.temperature, 1.0)
    weights = torch.exp((ordered - ordered[:, :1]) / heat[:, None])
    place = torch.arange(vocab, device=logits.device)
    weights *= (streams.top_k[:, None] == 0) | (place < streams.top_k[:, None])
    before = weights.cumsum(1) - weights
    whole = streams.top_p[:, None] >= 1
    kept = (weights > 0) & (whole | (before < streams.top_p[:, None] * weights.sum(1, keepdim=True)))
    keep = torch.empty_like(kept).scatter_(1, order, kept)
    return logits.masked_fill(~keep, float("-inf"))


@triton.jit
def _tally(logits, shown, temperature, parts, vocab, plane, BLOCK: tl.constexpr, CUT: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < vocab
    value = tl.load(logits + row * vocab + i, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    level = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    centred = value - level
    heat = tl.load(temperature + row).to(tl.float32)
    sharp = 1.0 / tl.where(heat > 0, heat, 1.0)
    at = row * tl.num_programs(1) + block
    tl.store(parts + at, top)
    # A NaN is found again in this sum: a maximum may pass it over.
    tl.store(parts + plane + at, tl.sum(tl.exp(centred), 0))
    if CUT:
        centred = tl.load(shown + row * vocab + i, mask=inside, other=float("-inf")).to(tl.float32) - level
    tl.store(parts + 2 * plane + at, tl.sum(tl.exp(centred * sharp), 0))
    first = tl.min(tl.where(value == top, i, vocab), 0)
    tl.store(parts + 3 * plane + at, first.to(tl.float32))


@triton.jit
def _uniform(key, count):
    z = key.to(tl.uint64, bitcast=True) + (count.to(tl.uint64) + 1) * GOLDEN
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    z = z ^ (z >> 31)
    return ((z >> 11).to(tl.float64) + 0.5) * (1.0 / 9007199254740992.0)


@triton.jit
def _pick(
    logits, shown, temperature, keys, counts, parts, tokens, logprobs, vocab, blocks, plane,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCKS)
    held = j < blocks
    at = row * blocks + j
    tops = tl.load(parts + at, mask=held, other=float("-inf"))
    top = tl.max(tops, 0)
    level = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    plain = tl.load(parts + plane + at, mask=held, other=0.0).to(tl.float64)
    drop = tl.where(tl.abs(tops) < float("inf"), tops - level, 0.0).to(tl.float64)
    normaliser = tl.sum(plain * tl.exp(drop), 0)
    good = (normaliser > 0) & (normaliser < float("inf")) & (tl.abs(top) < float("inf"))

    heat = tl.load(temperature + row)
    greedy = heat <= 0
    sharp = 1.0 / tl.where(greedy, 1.0, heat)
    weights = tl.load(parts + 2 * plane + at, mask=held, other=0.0).to(tl.float64) * tl.exp(drop * sharp)
    weights = tl.where(good, weights, 0.0)
    reached = tl.cumsum(weights, 0)
    target = _uniform(tl.load(keys + row), tl.load(counts + row)) * tl.sum(weights, 0)
    last = tl.max(tl.where(weights > 0, j, 0), 0)
    block = tl.minimum(tl.sum((reached <= target).to(tl.int32), 0), last)
    before = tl.sum(tl.where(j < block, weights, 0.0), 0)

    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < vocab
    value = tl.load(shown + row * vocab + i, mask=inside, other=float("-inf")).to(tl.float64)
    weights = tl.where(inside, tl.exp((value - level) * sharp), 0.0)
    chosen = block * BLOCK + tl.sum((before + tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
    chosen = tl.minimum(chosen, tl.max(tl.where(weights > 0, i, block * BLOCK), 0))
    largest = tl.min(tl.where(held & (tops == top), tl.load(parts + 3 * plane + at, mask=held, other=0.0), vocab), 0)
    chosen = tl.where(greedy, largest.to(tl.int32), chosen)
    chosen = tl.where(good, chosen, 0)
    value_chosen = tl.load(logits + row * vocab + chosen).to(tl.float64)
    logprob = value_chosen - level - tl.log(tl.where(good, normaliser, 1.0))
    tl.store(tokens + row, tl.where(good, chosen, -1).to(tl.int64))
    tl.store(logprobs + row, tl.where(good, logprob, float("nan")))
