"""What to draw, what was drawn, and the sampler in numpy: the torch backend's own and the native one's oracle."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinkfast.errors import BadInput

STOP, LENGTH, DEADLINE, ERROR = "stop", "length", "deadline", "error"
SEED_LIMIT = 2**63
NOT_DRAWN = -2  # in place of a token, where a row has ended or time was over


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw a completion.

    temperature 0 takes the largest logit (the first of equals). top_k 0 and top_p 1.0 cut nothing off; top_k acts
    first, then top_p on what it leaves. `stop` holds token-id sequences that end a sample and stay in it. `logprobs`
    asks for the log-probability of every token.
    Raises BadInput for a value out of range.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(tuple(sequence) for sequence in self.stop))
        if self.max_tokens < 1:
            raise BadInput(f"max_tokens is {self.max_tokens}, expected 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadInput(f"temperature is {self.temperature}, expected 0 or a positive number")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}, expected a number above 0 and at most 1")
        if self.top_k < 0:
            raise BadInput(f"top_k is {self.top_k}, expected 0 (off) or more")
        if not -SEED_LIMIT <= self.seed < SEED_LIMIT:
            raise BadInput(f"seed is {self.seed}, expected a 64-bit integer")
        if any(not sequence for sequence in self.stop):
            raise BadInput("stop holds an empty sequence, expected one or more token ids in each")


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion.

    token_ids: without the prompt and without the end-of-sequence token.
    finish_reason: "stop" (end of sequence or a stop sequence), "length" (max_tokens), "deadline", or "error" where the
    model's logits were not finite.
    t_start, t_end: seconds from the first prefill to the sample's admission and to the moment its last token was known.
    logprob_sum: log-probability of the chosen tokens, an end-of-sequence token included, under the model's own
    distribution (temperature 1, nothing cut off).
    logprobs: those of `token_ids` one by one, where they were asked for.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    t_start: float
    t_end: float
    logprob_sum: float
    logprobs: tuple[float, ...] = ()


def prompt_key(seed: int, prompt: Sequence[int]) -> int:
    """64-bit key of a prompt's ids under a seed."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=True), digest_size=8)
    digest.update(np.asarray(prompt, np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")


def sample_key(key: int, index: int) -> int:
    """64-bit key of sample `index` of the prompt with that key."""
    return int(_mix(np.array([key], np.uint64), np.array([index], np.uint64), np.uint64(0xD1342543DE82EF95))[0])


def uniform(keys: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1): element `counter` of the SplitMix64 stream of each key (Steele et al. 2014)."""
    bits = _mix(keys, counters.astype(np.uint64), np.uint64(0x9E3779B97F4A7C15))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(keys: NDArray[np.uint64], counters: NDArray[np.uint64], step: np.uint64) -> NDArray[np.uint64]:
    z = keys + (counters + np.uint64(1)) * step
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def likeliest(logits: NDArray[np.float32], n: int) -> tuple[tuple[int, float], ...]:
    """The n likeliest tokens of a row of logits (vocab,) and their log-probabilities, the likeliest first."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= math.log(np.exp(row).sum())
    best = np.argsort(-row, kind="stable")[:n].tolist()
    return tuple((token, float(row[token])) for token in best)


def draw(
    logits: NDArray[np.float32], keys: NDArray[np.uint64], counters: NDArray[np.int64], params: SamplingParams
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Draws one token a row of logits (rows, vocab) by inverting the cumulative distribution in order of ids.

    Returns tokens (rows,) and their log-probabilities under softmax(logits), untempered and uncut. A row with a NaN or
    without a finite maximum gives token -1 and log-probability NaN.
    """
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    good = np.isfinite(top)
    wide[~good], top[~good] = 0.0, 0.0
    centred = wide - top[:, None]
    normaliser = np.exp(centred).sum(axis=1)
    if params.temperature == 0:
        chosen = centred.argmax(axis=1)
    else:
        weights = np.exp(centred / params.temperature)
        _cut(centred, weights, params)
        chosen = invert(weights, uniform(keys, counters))
    logprobs = np.take_along_axis(centred, chosen[:, None], axis=1)[:, 0] - np.log(normaliser)
    return np.where(good, chosen, -1).astype(np.int32), np.where(good, logprobs, np.nan)


def invert(weights: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.intp]:
    """The id in each row of weights (rows, vocab) at which their running sum passes the share `at` of its end."""
    reached = weights.cumsum(axis=1)
    chosen = (reached <= (at * reached[:, -1])[:, None]).sum(axis=1)
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1)
    least: NDArray[np.intp] = np.minimum(chosen, last)
    return least


def probabilities(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The distribution (rows, vocab) that `draw` draws from; NaN in a row whose logits are not finite."""
    wide = logits.astype(np.float64)
    centred = wide - wide.max(axis=1, keepdims=True)
    if params.temperature == 0:
        weights = np.zeros_like(wide)
        weights[np.arange(len(wide)), wide.argmax(axis=1)] = 1.0
    else:
        weights = np.exp(centred / params.temperature)
        _cut(centred, weights, params)
    weights[~np.isfinite(centred.max(axis=1))] = np.nan
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _cut(centred: NDArray[np.float64], weights: NDArray[np.float64], params: SamplingParams) -> None:
    """Zeroes the weights that top_k and top_p drop; larger logits go first, among equals smaller ids."""
    vocab = centred.shape[1]
    cuts_k = 0 < params.top_k < vocab
    if not cuts_k and params.top_p >= 1:
        return
    order = np.argsort(-centred, axis=1, kind="stable")
    ordered = np.take_along_axis(weights, order, axis=1)
    if cuts_k:
        ordered[:, params.top_k :] = 0.0
    if params.top_p < 1:
        before = np.cumsum(ordered, axis=1) - ordered
        ordered[before >= params.top_p * ordered.sum(axis=1, keepdims=True)] = 0.0
    np.put_along_axis(weights, order, ordered, axis=1)
