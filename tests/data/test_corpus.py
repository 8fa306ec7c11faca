import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfast.data.corpus import Corpus, Cursor, batches, epoch_batches, write_corpus
from thinkfast.errors import BadInput

DOCUMENTS = [([5, 6], [7, 8, 9]), ([], [1]), ([2, 2, 2, 2], [3, 65]), ([4], [])]


def take(corpus, cursor, count, batch_tokens):
    stream = batches(corpus, cursor, batch_tokens)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize(("vocab_size", "width"), [(66, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_documents_come_back_as_they_were_written(tmp_path, vocab_size, width):
    write_corpus(tmp_path / "c", iter(DOCUMENTS), "print", vocab_size)
    corpus = Corpus(tmp_path / "c", fingerprint="print")
    assert [corpus.document(i) for i in range(len(corpus))] == DOCUMENTS
    assert corpus.tokens == 13
    assert (tmp_path / "c" / "tokens.bin").stat().st_size == 13 * width


def test_highest_ids_survive(tmp_path):
    documents = [([70_000], [0, 99_999])]
    assert write_corpus(tmp_path, documents, "f", 100_000).document(0) == documents[0]


def test_collate_pads_right_and_marks_completions(tmp_path):
    batch = write_corpus(tmp_path, DOCUMENTS, "f", 66).collate(np.array([2, 0, 1]))
    assert batch.input_ids.tolist() == [[2, 2, 2, 2, 3, 65], [5, 6, 7, 8, 9, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.completion.int().tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [6, 5, 1]
    assert batch.tokens == 12


def test_slice_is_a_corpus_of_its_own(tmp_path):
    corpus = write_corpus(tmp_path, DOCUMENTS, "f", 66)
    part = corpus.slice(1, 3)
    assert [part.document(i) for i in range(len(part))] == DOCUMENTS[1:3]
    assert part.collate(np.array([1])).input_ids.tolist() == [[2, 2, 2, 2, 3, 65]]
    assert part.identity != corpus.identity
    assert corpus.slice(0, 3).identity != part.identity


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (0, 5), (-1, 2), (3, 4)])
def test_impossible_slices_are_refused(tmp_path, start, stop):
    with pytest.raises(BadInput, match=str(tmp_path)):
        write_corpus(tmp_path, DOCUMENTS, "f", 66).slice(start, stop)


def test_identity_depends_on_content_and_boundaries(tmp_path):
    one = write_corpus(tmp_path / "a", [([1], [2, 3])], "f", 9).identity
    same = write_corpus(tmp_path / "b", [([1], [2, 3])], "f", 9).identity
    moved = write_corpus(tmp_path / "c", [([1, 2], [3])], "f", 9).identity
    assert one == same != moved


lengths = st.lists(st.integers(1, 200), min_size=1, max_size=120).map(np.array)


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(0, 3), st.integers(0, 3), st.integers(1, 600))
def test_an_epoch_is_a_permutation_within_the_token_budget(sizes, seed, epoch, batch_tokens):
    groups = epoch_batches(sizes, seed, epoch, batch_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or len(group) * sizes[group].max() <= batch_tokens


def test_epochs_and_seeds_differ_and_repeat():
    sizes = np.random.default_rng(0).integers(50, 900, 200)

    def flat(seed, epoch):
        return np.concatenate(epoch_batches(sizes, seed, epoch, 2000)).tolist()

    assert flat(0, 0) == flat(0, 0)
    assert len({tuple(flat(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_little_is_padding():
    sizes = np.random.default_rng(0).integers(100, 1000, 4000)
    groups = epoch_batches(sizes, 0, 0, 4096)
    padded = sum(len(group) * sizes[group].max() for group in groups)
    assert padded / sizes.sum() < 1.03
    assert len(groups) < 1.25 * sizes.sum() / 4096


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_cursor_continues_exactly(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=25))
    documents = [([index % 90], [index // 90] * size) for index, size in enumerate(sizes)]
    corpus = write_corpus(tmp_path_factory.mktemp("c"), documents, "f", 90)
    batch_tokens = data.draw(st.integers(1, 200))
    whole = take(corpus, Cursor(data.draw(st.integers(0, 9))), 20, batch_tokens)
    cut = data.draw(st.integers(1, 19))
    again = take(corpus, whole[cut - 1][1], 20 - cut, batch_tokens)
    for (expected, expected_cursor), (batch, cursor) in zip(whole[cut:], again, strict=True):
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert torch.equal(batch.completion, expected.completion)
        assert cursor == expected_cursor


def test_two_epochs_give_every_document_twice(tmp_path):
    documents = [([index], [index] * (index % 7 + 1)) for index in range(50)]
    corpus = write_corpus(tmp_path, documents, "f", 50)
    seen = []
    for batch, cursor in batches(corpus, Cursor(3), 64):
        seen += batch.input_ids[:, 0].tolist()
        if cursor.epoch == 2:
            break
    assert sorted(seen) == sorted([*range(50), *range(50)])
    assert seen[:50] != seen[50:]


def test_cursor_behind_its_epoch_is_refused(tmp_path):
    corpus = write_corpus(tmp_path, DOCUMENTS, "f", 66)
    with pytest.raises(BadInput, match="position 99"):
        next(batches(corpus, Cursor(0, 0, 99), 100))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no document"),
        ([([1, 2], []), ([3], [])], "no document has a completion token"),
        ([([1], [66])], "document 0 is empty or has an id outside 0..65"),
        ([([1], [2]), ([-1], [2])], "document 1"),
        ([([1], [2]), ([], [])], "document 1"),
    ],
)
def test_useless_documents_are_refused_and_leave_no_corpus(tmp_path, documents, message):
    with pytest.raises(BadInput, match=message):
        write_corpus(tmp_path, documents, "f", 66)
    with pytest.raises(BadInput, match="not found"):
        Corpus(tmp_path)


def test_another_tokenizer_is_refused(tmp_path):
    write_corpus(tmp_path, DOCUMENTS, "mine", 66)
    with pytest.raises(BadInput, match=r"corpus.json: tokenizer is mine, expected yours"):
        Corpus(tmp_path, fingerprint="yours")


def test_a_writer_that_dies_leaves_no_corpus_even_over_an_old_one(tmp_path):
    def failing():
        yield [1], [2]
        raise RuntimeError("killed")

    write_corpus(tmp_path, DOCUMENTS, "f", 66)
    with pytest.raises(RuntimeError, match="killed"):
        write_corpus(tmp_path, failing(), "f", 66)
    with pytest.raises(BadInput, match=r"corpus.json: not found"):
        Corpus(tmp_path)


@pytest.mark.parametrize("name", ["tokens.bin", "index.npy"])
def test_a_cut_file_is_detected(tmp_path, name):
    write_corpus(tmp_path, DOCUMENTS, "f", 66)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BadInput, match=str(tmp_path)):
        Corpus(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"format": 1, "documents": "many"})])
def test_a_broken_description_is_named(tmp_path, content):
    write_corpus(tmp_path, DOCUMENTS, "f", 66)
    (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(BadInput, match=r"corpus\.json") as caught:
        Corpus(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_refused(tmp_path):
    write_corpus(tmp_path, DOCUMENTS, "f", 66)
    description = json.loads((tmp_path / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps(description | {"format": 2}))
    with pytest.raises(BadInput, match="format is 2, expected 1"):
        Corpus(tmp_path)


def rows_of(corpus, seed, epoch, length):
    """The oracle: an epoch's documents, shuffled, behind one another, cut by hand."""
    order = np.random.default_rng([seed, epoch]).permutation(len(corpus))
    joined = [token for index in order for part in corpus.document(int(index)) for token in part]
    return [joined[at : at + length] for at in range(0, len(joined) - length + 1, length)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(1, 7), st.integers(1, 20))
def test_concatenated_rows_hold_every_token_once_and_resume_anywhere(tmp_path_factory, sizes, length, batch_tokens):
    documents = [([], list(range(1 + 10 * n, 1 + 10 * n + size))) for n, size in enumerate(sizes)]
    corpus = write_corpus(tmp_path_factory.mktemp("c"), documents, "f", 200)
    if corpus.tokens < length:
        with pytest.raises(BadInput, match="fewer than a row"):
            next(batches(corpus, Cursor(3), batch_tokens, length))
        return
    stream = batches(corpus, Cursor(3), batch_tokens, length)
    got, cursors = [], [Cursor(3)]
    while cursors[-1].epoch < 2:
        batch, cursor = next(stream)
        assert batch.input_ids.numel() <= max(batch_tokens, length)
        got.append(batch.input_ids.tolist())
        cursors.append(cursor)
    wanted = rows_of(corpus, 3, 0, length) + rows_of(corpus, 3, 1, length)
    assert [row for rows in got for row in rows] == wanted
    for at in (1, len(got) // 2):
        again, following = next(batches(corpus, cursors[at], batch_tokens, length))
        if cursors[at].epoch < 2 and at < len(got):
            assert again.input_ids.tolist() == got[at]
            assert following == cursors[at + 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_packed_batches_hold_every_document_whole_and_once_and_resume_anywhere(tmp_path_factory, sizes, batch_tokens):
    documents = [([], list(range(1 + 10 * n, 1 + 10 * n + size))) for n, size in enumerate(sizes)]
    corpus = write_corpus(tmp_path_factory.mktemp("c"), documents, "f", 200)
    stream = batches(corpus, Cursor(3), batch_tokens, packed=True)
    cursors, taken, got = [Cursor(3)], [], []
    while cursors[-1].epoch < 2:
        batch, cursor = next(stream)
        parts = [part.tolist() for part in batch.input_ids[0].split(batch.bounds.diff().tolist())]
        assert batch.tokens == sum(map(len, parts)) == int(batch.bounds[-1])
        assert batch.tokens <= batch_tokens or len(parts) == 1
        cursors.append(cursor)
        taken.append(batch)
        got += parts
    assert sorted(got) == sorted(2 * [completion for _, completion in documents])
    for at in (1, len(taken) // 2):
        again, following = next(batches(corpus, cursors[at], batch_tokens, packed=True))
        if at < len(taken):
            assert torch.equal(again.input_ids, taken[at].input_ids)
            assert following == cursors[at + 1]


def test_a_packed_document_is_not_learnt_from_the_one_before(tmp_path):
    corpus = write_corpus(tmp_path, DOCUMENTS, "f", 66)
    batch = corpus.pack(np.array([2, 1, 0]))
    assert batch.input_ids.tolist() == [[2, 2, 2, 2, 3, 65, 1, 5, 6, 7, 8, 9]]
    assert batch.bounds.tolist() == [0, 6, 7, 12]
    # The only token of the second document belongs to its completion, and nothing predicts it.
    assert batch.completion.int().tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]]


def test_concatenated_rows_mark_completions_as_documents_do(tmp_path):
    corpus = write_corpus(tmp_path, DOCUMENTS, "f", 66)
    batch = corpus.stream(np.array([2, 0, 1, 3]), range(2), 6)
    assert batch.input_ids.tolist() == [[2, 2, 2, 2, 3, 65], [5, 6, 7, 8, 9, 1]]
    assert batch.completion.int().tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert batch.lengths.tolist() == [6, 6]
