"""What one document may know of another: nothing in rows of their own, and nothing where they are packed into one; in
concatenated rows, what stands before it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from thinkfast.data.corpus import Corpus, Cursor, batches, write_corpus
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder

MIXER = MambaConfig(n_heads=4, head_dim=8, d_state=8, n_groups=4, chunk_size=8)
KINDS = {"teacher": (ATTENTION, ATTENTION), "hybrid": (MAMBA, ATTENTION), "pure": (MAMBA, MAMBA)}


@pytest.fixture(params=KINDS)
def model(request) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(50, 32, 48, 4, 2, 8, KINDS[request.param], MIXER)).eval()


def corpus_of(path, documents) -> Corpus:
    return write_corpus(path, documents, "f", 50)


def changed(documents, index: int):
    """The documents with one token of one of them exchanged."""
    other = [(list(prompt), list(completion)) for prompt, completion in documents]
    other[index][1][1] += 1
    return other


def documents(count: int = 6):
    random = np.random.default_rng(2)
    return [([], random.integers(1, 40, size).tolist()) for size in random.integers(8, 14, count)]


@torch.no_grad()
def test_documents_in_rows_of_their_own_do_not_know_each_other(tmp_path, model):
    plain = documents()
    one = corpus_of(tmp_path / "a", plain).collate(np.arange(6))
    two = corpus_of(tmp_path / "b", changed(plain, 3)).collate(np.arange(6))
    before, after = model(one.input_ids), model(two.input_ids)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[3], after[3])
    alone = model(one.input_ids[4:5, : one.lengths[4]])
    assert torch.allclose(before[4, : one.lengths[4]], alone[0], atol=1e-5)


@torch.no_grad()
def test_packed_documents_do_not_know_each_other(tmp_path, model):
    plain = documents()
    one, two = corpus_of(tmp_path / "a", plain), corpus_of(tmp_path / "b", changed(plain, 3))
    (first, _), (second, _) = (next(batches(corpus, Cursor(5), 1000, packed=True)) for corpus in (one, two))
    ((_, place),) = (first.input_ids != second.input_ids).nonzero().tolist()
    ends = first.bounds.tolist()
    assert len(ends) == 7
    (start, end), *_ = [pair for pair in pairwise(ends) if pair[0] <= place < pair[1]]
    assert 0 < start < end < ends[-1]
    before, after = (model.hidden(batch.input_ids, bounds=batch.bounds)[0] for batch in (first, second))
    same = (before == after).all(-1)
    assert same[:place].all()
    assert same[end:].all()
    assert not same[place:end].any()


@torch.no_grad()
def test_a_concatenated_row_reads_backwards_only_and_no_other_row(tmp_path, model):
    plain, length = documents(), 20
    one, two = corpus_of(tmp_path / "a", plain), corpus_of(tmp_path / "b", changed(plain, 3))
    (first, _), (second, _) = (next(batches(corpus, Cursor(5), 1000, length)) for corpus in (one, two))
    ((row, place),) = (first.input_ids != second.input_ids).nonzero().tolist()
    before, after = model(first.input_ids), model(second.input_ids)
    rows = [index for index in range(len(before)) if index != row]
    assert rows
    assert torch.equal(before[rows], after[rows])
    assert torch.equal(before[row, :place], after[row, :place])
    # A document behind the changed one, in the same row, does read it: teacher and student alike.
    assert not torch.equal(before[row, place:], after[row, place:])
