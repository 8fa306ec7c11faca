"""Tokenised documents in one flat file, read through a memory map in an order that a cursor fixes.

A corpus is a directory: `tokens.bin` (all ids one after another, uint16 or uint32), `index.npy` (int64, one row a
document: offset and prompt length, and a last row with the total), `gaps.npy` where conversations have several answers
(int64, one row a gap: document, begin and end of what stands between two answers) and `corpus.json` (counts and the
tokenizer's fingerprint), which is written last: a directory without it is not a corpus.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinkfast.data import writer
from thinkfast.errors import BadInput

LENGTH_BUCKET = 16


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the endless stream of batches: `position` batches of this epoch have been taken."""

    seed: int
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents padded on the right with id 0; lengths (B,) counts real tokens.

    input_ids (B, L) int64; completion (B, L) bool is true exactly where a token belongs to a completion. With `bounds`
    (documents + 1,), int64 on the CPU, from 0 to L, there is one row and each document in it is to be read alone; none
    of them has anything to learn in its first token.
    """

    input_ids: Tensor
    completion: Tensor
    lengths: Tensor
    bounds: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            completion=self.completion.to(device),
            lengths=self.lengths.to(device),
        )


def write_corpus(
    path: Path | str,
    documents: Iterable[Sequence[list[int]]],
    fingerprint: str,
    vocab_size: int,
    sources: Sequence[Mapping[str, Any]] = (),
) -> Corpus:
    """Writes documents of (prompt ids, completion ids, prompt ids, completion ids, ...) as a directory and opens it.

    Completions should end with the end-of-sequence id where the model is to learn to stop. `sources` is noted in
    corpus.json. What was begun there before is written anew; `writer.write_documents` goes on with it. Raises BadInput
    when an id does not fit the vocabulary, and when there is no completion token at all.
    """
    root, noted = Path(path), [dict(source) for source in sources]
    shutil.rmtree(root / writer.PART, ignore_errors=True)
    writer.write_documents(root, lambda _: documents, fingerprint, vocab_size, noted)
    return Corpus(root)


class Corpus:
    """A corpus directory, memory-mapped. Raises BadInput when it is missing, half written, empty, or when `fingerprint`
    is given and the corpus was tokenised by another tokenizer."""

    def __init__(self, path: Path | str, fingerprint: str | None = None) -> None:
        self.path = Path(path)
        described = self.path / "corpus.json"
        try:
            description = json.loads(described.read_text(encoding="utf-8"))
            self.vocab_size = int(description["vocab_size"])
            self.fingerprint = str(description["tokenizer"])
            self.identity = str(description["sha256"])
            dtype = np.dtype(description["dtype"])
            documents, tokens = int(description["documents"]), int(description["tokens"])
            completion_tokens, gaps = int(description["completion_tokens"]), int(description.get("gaps", 0))
            known = description["format"] == writer.FORMAT
        except FileNotFoundError:
            raise BadInput(f"{described}: not found; the corpus is missing or was not written to its end") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{described}: not a corpus description ({type(error).__name__}: {error})") from None
        if not known:
            raise BadInput(f"{described}: format is {description['format']!r}, expected {writer.FORMAT}")
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise BadInput(
                f"{described}: tokenizer is {self.fingerprint}, expected {fingerprint}; tokenise the data again"
            )
        writer.check_counts(self.path, documents, completion_tokens)
        try:
            index = np.load(self.path / "index.npy")
            self._gaps: npt.NDArray[np.int64] = (
                np.load(self.path / "gaps.npy") if gaps else np.zeros((0, 3), dtype=np.int64)
            )
            self._tokens: npt.NDArray[np.unsignedinteger] = np.memmap(self.path / "tokens.bin", dtype=dtype, mode="r")
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.path}: tokens.bin, index.npy or gaps.npy cannot be read ({error})") from None
        if (
            index.shape != (documents + 1, 2)
            or index[-1, 0] != tokens
            or len(self._tokens) != tokens
            or len(self._gaps) != gaps
        ):
            raise BadInput(
                f"{self.path}: tokens.bin, index.npy and gaps.npy do not match corpus.json; the corpus is half written"
            )
        self._offsets: npt.NDArray[np.int64] = index[:-1, 0].copy()
        self.lengths: npt.NDArray[np.int64] = np.diff(index[:, 0])
        self.prompt_lengths: npt.NDArray[np.int64] = index[:-1, 1].copy()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, prompts included."""
        return int(self.lengths.sum())

    def slice(self, start: int, stop: int) -> Corpus:
        """Documents start..stop-1 as a corpus of their own, without a copy. Raises BadInput when the range is empty,
        not inside the corpus, or has no completion token."""
        if not 0 <= start < stop <= len(self):
            raise BadInput(f"{self.path}: documents {start}..{stop} were asked for, it has {len(self)}")
        part = copy.copy(self)
        part._offsets = self._offsets[start:stop]
        part.lengths = self.lengths[start:stop]
        part.prompt_lengths = self.prompt_lengths[start:stop]
        part.identity = f"{self.identity}[{start}:{stop}]"
        first, last = np.searchsorted(self._gaps[:, 0], (start, stop))
        part._gaps = self._gaps[first:last] - np.asarray([start, 0, 0])
        learnt = part.lengths.sum() - part.prompt_lengths.sum() - (part._gaps[:, 2] - part._gaps[:, 1]).sum()
        writer.check_counts(self.path, len(part), int(learnt))
        return part

    def document(self, index: int) -> tuple[list[int], list[int]]:
        """The ids of one document up to its first completion, and all others."""
        start, cut = int(self._offsets[index]), int(self.prompt_lengths[index])
        ids = self._tokens[start : start + int(self.lengths[index])].tolist()
        return ids[:cut], ids[cut:]

    def stretches(self, index: int) -> list[list[int]]:
        """The ids of one document as it was written: in turn given and to be learnt."""
        start, length = int(self._offsets[index]), int(self.lengths[index])
        cuts = [0, int(self.prompt_lengths[index]), *(at for gap in self._gaps_of(index) for at in gap), length]
        ids = self._tokens[start : start + length].tolist()
        return [ids[begin:end] for begin, end in pairwise(cuts)]

    def collate(self, indices: npt.NDArray[np.int64]) -> Batch:
        """The documents `indices`, padded to the longest of them."""
        lengths = self.lengths[indices]
        ids = np.zeros((len(indices), int(lengths.max())), dtype=np.int64)
        for row, index in enumerate(indices):
            start, length = int(self._offsets[index]), int(lengths[row])
            ids[row, :length] = self._tokens[start : start + length]
        slots = np.arange(ids.shape[1])
        completion = (slots >= self.prompt_lengths[indices][:, None]) & (slots < lengths[:, None])
        for row, index in enumerate(indices if len(self._gaps) else []):
            for begin, end in self._gaps_of(int(index)):
                completion[row, begin:end] = False
        return Batch(torch.from_numpy(ids), torch.from_numpy(completion), torch.from_numpy(lengths.copy()))

    def stream(self, order: npt.NDArray[np.int64], rows: range, length: int) -> Batch:
        """Rows of `length` tokens out of the documents in `order`, written one behind the other without a break."""
        ends = np.cumsum(self.lengths[order])
        ids = np.zeros((len(rows), length), dtype=np.int64)
        completion = np.zeros((len(rows), length), dtype=bool)
        for row, number in enumerate(rows):
            filled, start = 0, number * length
            while filled < length:
                place = int(np.searchsorted(ends, start + filled, side="right"))
                index = int(order[place])
                skip = start + filled - int(ends[place] - self.lengths[index])
                count = min(int(self.lengths[index]) - skip, length - filled)
                offset = int(self._offsets[index]) + skip
                here = slice(filled, filled + count)
                ids[row, here] = self._tokens[offset : offset + count]
                completion[row, here] = self._completion(index)[skip : skip + count]
                filled += count
        lengths = torch.full((len(rows),), length)
        return Batch(torch.from_numpy(ids), torch.from_numpy(completion), lengths)

    def pack(self, indices: npt.NDArray[np.int64]) -> Batch:
        """The documents `indices` one behind another in one row, each to be read alone."""
        bounds = torch.from_numpy(np.cumsum([0, *self.lengths[indices]]))
        joined = self.stream(indices, range(1), int(bounds[-1]))
        joined.completion[0, bounds[:-1]] = False
        return replace(joined, bounds=bounds)

    def _completion(self, index: int) -> npt.NDArray[np.bool_]:
        """Which tokens of a document belong to a completion."""
        mask: npt.NDArray[np.bool_] = np.arange(self.lengths[index]) >= self.prompt_lengths[index]
        for begin, end in self._gaps_of(index):
            mask[begin:end] = False
        return mask

    def _gaps_of(self, index: int) -> list[tuple[int, int]]:
        """Begin and end of every stretch of a document between two of its completions."""
        first, last = np.searchsorted(self._gaps[:, 0], (index, index + 1))
        return [(int(begin), int(end)) for _, begin, end in self._gaps[first:last]]


def epoch_batches(
    lengths: npt.NDArray[np.int64], seed: int, epoch: int, batch_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """The batches of one epoch, as arrays of document indices: every document exactly once.

    Documents are sorted by length in buckets of 16 tokens, at random inside a bucket, and cut into batches of at most
    `batch_tokens` padded tokens (a longer document is a batch of its own); then the batches are shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    order = np.lexsort((random.random(len(lengths)), -(-lengths // LENGTH_BUCKET)))
    cuts, start, longest = [], 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if place > start and (place + 1 - start) * longest > batch_tokens:
            cuts.append(place)
            start, longest = place, length
    groups = np.split(order, cuts)
    return [groups[i] for i in random.permutation(len(groups))]


def packed_batches(
    lengths: npt.NDArray[np.int64], seed: int, epoch: int, batch_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """As `epoch_batches`, for documents without padding between them: in any order, as many as fit."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    cuts, filled = [], 0
    for place, length in enumerate(lengths[order].tolist()):
        filled += length
        if place and filled > batch_tokens:
            cuts.append(place)
            filled = length
    return np.split(order, cuts)


def batches(
    corpus: Corpus, cursor: Cursor, batch_tokens: int, row_tokens: int | None = None, packed: bool = False
) -> Iterator[tuple[Batch, Cursor]]:
    """Endless batches from `cursor` on, each with the cursor that follows it.

    Without `row_tokens` neither attention nor convolution nor state of a document sees another one, which is what
    cross-entropy on isolated documents asks for: each has a row of its own, or where they are `packed` they share one
    that says where each begins. With `row_tokens` an epoch's documents, shuffled, are cut into rows of that many
    tokens; a row begins anywhere and reads across documents. Where teacher and student read the same row that is
    sound, and nothing is padding; a last part shorter than a row is left out.

    The n-th batch is a function of all that is given but the number of processes, so that a run goes on exactly where
    it stopped. Raises BadInput when the cursor points behind its epoch, and when the corpus does not fill one row.
    """
    if row_tokens is not None and corpus.tokens < row_tokens:
        raise BadInput(f"{corpus.path}: {corpus.tokens} tokens, fewer than a row of {row_tokens}")
    seed, epoch, position = cursor.seed, cursor.epoch, cursor.position
    while True:
        makers = _epoch(corpus, seed, epoch, batch_tokens, row_tokens, packed)
        if position >= len(makers):
            raise BadInput(f"{corpus.path}: cursor position {position}, but an epoch has {len(makers)} batches")
        for place in range(position, len(makers)):
            last = place + 1 == len(makers)
            yield makers[place](), Cursor(seed, epoch + 1, 0) if last else Cursor(seed, epoch, place + 1)
        epoch, position = epoch + 1, 0


def _epoch(
    corpus: Corpus, seed: int, epoch: int, batch_tokens: int, row_tokens: int | None, packed: bool
) -> list[Callable[[], Batch]]:
    """What makes each batch of an epoch."""
    if row_tokens is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(corpus))
        rows, full = max(1, batch_tokens // row_tokens), corpus.tokens // row_tokens
        starts = range(0, full, rows)
        return [partial(corpus.stream, order, range(at, min(at + rows, full)), row_tokens) for at in starts]
    if packed:
        return [partial(corpus.pack, group) for group in packed_batches(corpus.lengths, seed, epoch, batch_tokens)]
    return [partial(corpus.collate, group) for group in epoch_batches(corpus.lengths, seed, epoch, batch_tokens)]
