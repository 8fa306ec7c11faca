"""Speculative decoding for few samples at a time: a draft proposes tokens, the model judges them all in one pass.

A token that the draft drew from q and the model gives p is taken with probability min(1, p/q); the first one refused is
replaced by one from max(0, p - q) (Leviathan et al., arXiv 2211.17192, Alg. 1), so that what comes out is distributed
as the model's own samples. Keys and values of refused tokens are cut off. A state cannot be cut: the one behind the
last pass that was right to its end is kept, and what was right after it is fed again with what comes next
(arXiv 2408.15237, section 4), never is a state stored for every token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinkfast.engine.backends import Drawn, Kept, TorchMemory
from thinkfast.engine.sampling import SamplingParams, invert, probabilities, uniform
from thinkfast.engine.slots import SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.cache import AttentionCache, Cache, LayerCache, MambaCache, new_cache
from thinkfast.model.decoder import Decoder

AHEAD = 4
REFEED = 16  # tokens behind a kept state that are fed again; with more, the state moves on first
JUDGING, REPLACING = np.uint64(0x9D39247E33776D41), np.uint64(0x2AF7398005AAA5C7)  # streams beside a sample's own
Ready = deque[tuple[int, float, NDArray[np.float32]]]


class Follower:
    """A model and what it remembers of `slots` sequences, whose latest tokens can be taken back.

    tail: for each slot the tokens that are certain and that its kept state (or its keys and values) has not seen.
    """

    def __init__(self, model: Decoder, slots: int, capacity: int, dtype: torch.dtype) -> None:
        self.model, self.slots = model, slots
        self.tail: list[list[int]] = [[] for _ in range(slots)]
        self._cache = new_cache(model.config, slots, capacity, dtype, model.embed_tokens.weight.device)
        self._running = [layer for layer in self._cache.layers if isinstance(layer, MambaCache)]
        self._kept = [MambaCache(layer.conv.clone(), layer.state.clone()) for layer in self._running]
        self._sure = np.zeros(slots, np.int64)
        self._fed = np.zeros(slots, np.int64)
        self._spoilt = np.zeros(slots, bool)

    def load(self, slot: int, kept: Cache, length: int) -> None:
        """Puts the state behind a prompt into a slot."""
        row = torch.tensor([slot], device=self.model.embed_tokens.weight.device)
        for layer in self._cache.layers:
            if isinstance(layer, AttentionCache):
                layer.keys[slot], layer.values[slot] = 0, 0  # a NaN would pass through a mask
        self._cache.copy_rows(kept, torch.zeros_like(row), row)
        self._sure[slot], self._fed[slot], self._spoilt[slot] = length, 0, False
        self.tail[slot] = []
        self._keep(slot)

    @torch.inference_mode()
    def run(self, pieces: Mapping[int, Sequence[int]], exact: bool) -> dict[int, Tensor]:
        """Feeds every slot its piece; returns the logits behind each of the tokens.

        Where pieces of different lengths go through the model together, states of the slots with shorter ones are
        spoilt: `exact` feeds them apart.
        """
        lengths = {len(piece) for piece in pieces.values()}
        if len(pieces) == 1 or (exact and self._kept and len(lengths) > 1):
            out = {slot: self._forward(slice(slot, slot + 1), [piece])[0] for slot, piece in pieces.items()}
        else:
            width = max(lengths)
            padded = [[*pieces.get(slot, ()), *[0] * width][:width] for slot in range(self.slots)]
            logits = self._forward(slice(None), padded)
            out = {slot: logits[slot, : len(piece)] for slot, piece in pieces.items()}
            for slot in range(self.slots):
                self._spoilt[slot] |= len(pieces.get(slot, ())) < width
        for slot, piece in pieces.items():
            self._fed[slot] += len(piece)
        return out

    def settle(self, right: Mapping[int, int]) -> None:
        """Takes everything back that was fed since the last call but the first right[slot] tokens of a slot's tail."""
        for slot in range(self.slots):
            held = right.get(slot, 0)
            if self._kept and (self._spoilt[slot] or held < self._fed[slot]):
                self._restore(slot)
            else:
                self._sure[slot] += held
                del self.tail[slot][:held]
                if held:
                    self._keep(slot)
            self._fed[slot], self._spoilt[slot] = 0, False

    def catch_up(self, slot: int) -> None:
        """Moves the kept state on where its tail has become long."""
        if len(self.tail[slot]) > REFEED:
            self.run({slot: self.tail[slot][:-1]}, exact=True)
            self.settle({slot: len(self.tail[slot]) - 1})

    def _forward(self, rows: slice, tokens: Sequence[Sequence[int]]) -> Tensor:
        device = self.model.embed_tokens.weight.device
        position = torch.from_numpy(self._sure + self._fed).to(device)
        view: list[LayerCache] = []
        for layer in self._cache.layers:
            if isinstance(layer, AttentionCache):
                layer.lengths.copy_(position)
                view.append(AttentionCache(layer.keys[rows], layer.values[rows], layer.lengths[rows]))
            else:
                view.append(MambaCache(layer.conv[rows], layer.state[rows]))
        logits: Tensor = self.model(torch.tensor([list(row) for row in tokens], device=device), Cache(view))
        return logits

    def _keep(self, slot: int) -> None:
        for kept, running in zip(self._kept, self._running, strict=True):
            kept.conv[slot], kept.state[slot] = running.conv[slot], running.state[slot]

    def _restore(self, slot: int) -> None:
        for kept, running in zip(self._kept, self._running, strict=True):
            running.conv[slot], running.state[slot] = kept.conv[slot], kept.state[slot]


class SpeculativeMemory:
    """What a model and its draft remember. A step hands out one token a row; a pass draws several ahead."""

    def __init__(self, backend: SpeculativeBackend, slots: int, capacity: int) -> None:
        self.slots, self.capacity, self.ahead = slots, capacity, backend.ahead
        room = capacity + REFEED + 4 * self.ahead + 4  # idle slots and guesses reach beyond the end
        models = (backend.model, backend.draft)
        self._prefills = [TorchMemory(model, 1, 1, backend.dtype, backend.device) for model in models]
        self._model, self._draft = (Follower(model, slots, room, backend.dtype) for model in models)
        self._ready: list[Ready] = [deque() for _ in range(slots)]

    def prefill(self, prompts: Sequence[Sequence[int]], behind: Sequence[Kept | None] = ()) -> list[Kept]:
        apart = [[None if kept is None else self._parts(kept)[at] for kept in behind] for at in (0, 1)]
        done = [memory.prefill(prompts, states) for memory, states in zip(self._prefills, apart, strict=True)]
        return [Kept(own.length, Cache(_layers(own) + _layers(other))) for own, other in zip(*done, strict=True)]

    def fork(self, kept: Kept, slot: int) -> None:
        for follower, part in zip((self._model, self._draft), self._parts(kept), strict=True):
            follower.load(slot, Cache(_layers(part)), kept.length)
        self._ready[slot].clear()

    def step(self, table: SlotTable, rows: NDArray[np.int32], logits: NDArray[np.float32] | None = None) -> Drawn:
        if not all(self._ready[slot] for slot in rows):
            # Slots that were luckier go along while they are not far ahead: a pass costs about the same.
            self._pass(table, [int(slot) for slot in rows if self._goes_along(int(slot))])
        tokens, logprobs = np.empty(len(rows), np.int32), np.empty(len(rows), np.float64)
        for at, slot in enumerate(rows):
            tokens[at], logprobs[at], row = self._ready[slot].popleft()
            if logits is not None:
                logits[at] = row
        return tokens, logprobs

    def _goes_along(self, slot: int) -> bool:
        ready = self._ready[slot]
        return not ready or (len(ready) < self.ahead and ready[-1][0] >= 0)

    def _pass(self, table: SlotTable, slots: list[int]) -> None:
        """Draws one token or more for each of the slots."""
        for slot in slots:
            for follower in (self._model, self._draft):
                follower.tail[slot] = follower.tail[slot] or [int(table.token[slot])]
                follower.catch_up(slot)
        shares = {slot: np.empty((self.ahead, self._model.model.config.vocab_size)) for slot in slots}
        guesses: dict[int, list[int]] = {slot: [] for slot in slots}
        pieces = {slot: list(self._draft.tail[slot]) for slot in slots}
        for at in range(self.ahead):
            for slot, out in self._draft.run(pieces, exact=True).items():
                (share,) = probabilities(_numpy(out[-1:]), table.params[slot])
                if np.isnan(share[0]):
                    share = np.eye(1, len(share))[0]  # whatever it guesses, it is judged right
                shares[slot][at] = share
                drawn = uniform(table.key[slot : slot + 1], self._count(table, slot) + at)
                guesses[slot].append(int(invert(share[None], drawn)[0]))
            pieces = {slot: guesses[slot][-1:] for slot in slots}
        judged = self._model.run({slot: self._model.tail[slot] + guesses[slot] for slot in slots}, exact=False)
        right: list[dict[int, int]] = [{}, {}]
        for slot in slots:
            logits = _numpy(judged[slot][-self.ahead - 1 :])
            keys = np.full(self.ahead + 1, table.key[slot])
            counts = self._count(table, slot) + np.arange(self.ahead + 1)
            tokens = judge(logits, shares[slot], guesses[slot], keys, counts, table.params[slot])
            for token, row in zip(tokens, logits, strict=False):
                self._ready[slot].append((token, _logprob(row, token), row))
            taken = len(tokens) - 1
            right[0][slot] = len(self._model.tail[slot]) + taken
            right[1][slot] = len(self._draft.tail[slot]) + min(taken, self.ahead - 1)
            for follower in (self._model, self._draft):
                follower.tail[slot] += tokens
        self._model.settle(right[0])
        self._draft.settle(right[1])

    def _count(self, table: SlotTable, slot: int) -> NDArray[np.int64]:
        """The number of the next token to draw."""
        return table.count[slot : slot + 1] + len(self._ready[slot])

    def _parts(self, kept: Kept) -> tuple[Kept, Kept]:
        layers, own = _layers(kept), len(self._model.model.config.layer_types)
        return Kept(kept.length, Cache(layers[:own])), Kept(kept.length, Cache(layers[own:]))


class SpeculativeBackend:
    """`Decoder.forward` of a model and of a draft with the same vocabulary, which guesses `ahead` tokens at a time."""

    name = "speculative"

    def __init__(self, model: Decoder, draft: Decoder, kv_dtype: str = "auto", ahead: int = AHEAD) -> None:
        sizes = model.config.vocab_size, draft.config.vocab_size
        if sizes[0] != sizes[1]:
            raise BadInput(f"draft has a vocabulary of {sizes[1]} tokens, expected the model's {sizes[0]}")
        weight = model.embed_tokens.weight
        if draft.embed_tokens.weight.device != weight.device:
            raise BadInput(f"draft is on {draft.embed_tokens.weight.device}, expected the model's {weight.device}")
        self.model, self.draft, self.ahead = model, draft, ahead
        self.device = weight.device
        self.dtype: torch.dtype = weight.dtype if kv_dtype == "auto" else getattr(torch, kv_dtype)
        self.kv_dtype = str(self.dtype).removeprefix("torch.")

    def memory(self, slots: int, capacity: int) -> SpeculativeMemory:
        return SpeculativeMemory(self, slots, capacity)

    def fits(self, memory: object, capacity: int) -> bool:
        return isinstance(memory, SpeculativeMemory) and memory.capacity >= capacity


def judge(
    logits: NDArray[np.float32],
    shares: NDArray[np.float64],
    guesses: Sequence[int],
    keys: NDArray[np.uint64],
    counts: NDArray[np.int64],
    params: SamplingParams,
) -> list[int]:
    """The guesses that are taken and one more token; -1 in place of it where the model's logits are not finite.

    logits (guesses + 1, vocab): the model's before every guess and behind the last; shares (guesses, vocab): what the
    guesses were drawn from; keys, counts (guesses + 1,): the random stream of each place.
    """
    wanted = probabilities(logits, params)
    coins, others = uniform(keys ^ JUDGING, counts), uniform(keys ^ REPLACING, counts)
    tokens: list[int] = []
    for at, (guess, share, own) in enumerate(zip(guesses, shares, wanted, strict=False)):
        if np.isnan(own[0]):
            return [*tokens, -1]
        if coins[at] * share[guess] < own[guess]:
            tokens.append(guess)
            continue
        left = np.maximum(own - share, 0.0)
        if left.sum() <= 0.0:  # the two are equal but for rounding
            left = own
        return [*tokens, int(invert(left[None], others[at : at + 1])[0])]
    if np.isnan(wanted[-1, 0]):
        return [*tokens, -1]
    return [*tokens, int(invert(wanted[-1:], uniform(keys[-1:], counts[-1:]))[0])]


def _layers(kept: Kept) -> list[LayerCache]:
    assert isinstance(kept.state, Cache)
    return kept.state.layers


def _logprob(row: NDArray[np.float32], token: int) -> float:
    if token < 0:
        return float("nan")
    wide = row.astype(np.float64) - row.max()
    return float(wide[token] - np.log(np.exp(wide).sum()))


def _numpy(logits: Tensor) -> NDArray[np.float32]:
    held: NDArray[np.float32] = logits.float().cpu().numpy()
    return held
