"""What must not change a bit: threads, sharing, the form of the weights. And other instruction sets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from thinkfast.engine.backends import NativeBackend
from thinkfast.model.config import DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.ops.cpu.build import find_compiler
from thinkfast.ops.cpu.native import PAGE_TOKENS, NativePool, library

VOCAB = 50
SHAPES = {
    "attention": (("attention",) * 2, None),
    "hybrid": (("mamba", "attention"), MambaConfig(3, 20, 7, 3)),
    "pure": (("mamba",) * 2, MambaConfig(6, 16, 16, 2)),
}


def make(name: str) -> Decoder:
    kinds, mamba = SHAPES[name]
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(VOCAB, 40, 56, 6, 2, 20, kinds, mamba)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" not in key and value.ndim == 2:
                value.normal_(0.0, 0.2)
    return model


def pool_of(
    model: Decoder, slots: int, threads: int = 1, weights: str = "float32", pages: int | None = None
) -> NativePool:
    return NativePool(NativeBackend(model, "bfloat16", weights).model, slots, 700, True, threads, pages)


def feed(pool: NativePool, tokens: np.ndarray, position: int) -> np.ndarray:
    rows = len(tokens)
    logits = np.empty((rows, VOCAB), np.float32)
    slots, places = np.arange(rows, dtype=np.int32), np.full(rows, position, np.int32)
    keys, counters = np.zeros(rows, np.uint64), np.zeros(rows, np.int64)
    pool.step(slots, tokens.astype(np.int32), places, keys, counters, 1.0, 0, 1.0, logits)
    return logits


def run(pool: NativePool, rows: int, prompt: int, steps: int, shared: int | None = None) -> np.ndarray:
    """Logits (steps, rows, vocab) behind a prompt that all rows have in common."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (steps, rows))
    pool.prefill([rows], [np.random.default_rng(1).integers(0, VOCAB, prompt).tolist()])
    kept = pool.keep(rows, prompt)
    for slot in range(rows):
        pool.resume(slot, kept, shared)
    return np.stack([feed(pool, ids[step], prompt + step) for step in range(steps)])


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_threads_change_no_bit(name: str, rows: int) -> None:
    """Few rows are computed by all threads together, many are shared out."""
    model = make(name)
    want = run(pool_of(model, rows + 1), rows, 75, 3)
    for threads in (2, 3):
        np.testing.assert_array_equal(run(pool_of(model, rows + 1, threads), rows, 75, 3), want)


@pytest.mark.parametrize("name", ["attention", "hybrid"])
def test_shared_pages_change_no_bit(name: str) -> None:
    """Prompts that end within a page, within a chunk of pages, and behind two chunks."""
    model = make(name)
    for prompt in (20, 200, 600):
        want = run(pool_of(model, 10), 9, prompt, 40, shared=0)
        np.testing.assert_array_equal(run(pool_of(model, 10), 9, prompt, 40), want)
        np.testing.assert_array_equal(run(pool_of(model, 10, threads=2), 9, prompt, 40), want)


def test_neighbours_with_fewer_pages_read_none_that_is_not_theirs() -> None:
    """Rows of one prompt that have drawn very different numbers of tokens."""
    model = make("attention")
    pool, alone = pool_of(model, 4), pool_of(model, 4)
    prompt = list(range(40))
    pool.prefill([3], [prompt])
    kept = pool.keep(3, 40)
    lengths = (45, 300, 60)
    for slot, length in enumerate(lengths):
        pool.resume(slot, kept)
        tail = np.random.default_rng(slot).integers(0, VOCAB, length - 40).tolist()
        pool.prefill([slot], [tail], [40])
        alone.prefill([slot], [prompt + tail])
    columns = (np.zeros(3, np.uint64), np.zeros(3, np.int64))
    got, want = np.empty((3, VOCAB), np.float32), np.empty((3, VOCAB), np.float32)
    slots, tokens, places = np.arange(3, dtype=np.int32), np.ones(3, np.int32), np.array(lengths, np.int32)
    pool.step(slots, tokens, places, *columns, 1.0, 0, 1.0, got)
    for slot in range(3):
        one = slice(slot, slot + 1)
        alone.step(slots[one], tokens[one], places[one], columns[0][one], columns[1][one], 1.0, 0, 1.0, want[one])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_bfloat16_weights_are_the_rounded_ones(name: str) -> None:
    model = make(name)
    got = run(pool_of(model, 4, weights="bfloat16"), 3, 10, 3)
    exact = run(pool_of(model, 4), 3, 10, 3)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2:
                value.copy_(value.bfloat16().float())
    np.testing.assert_array_equal(got, run(pool_of(model, 4), 3, 10, 3))
    assert NativeBackend(model, "auto").weights == "bfloat16"
    assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 5e-2


def test_pages_come_and_go() -> None:
    pool = pool_of(make("attention"), 3, pages=5)
    pool.prefill([0], [[1] * (3 * PAGE_TOKENS + 1)])
    assert pool.pages_used == 4
    kept = pool.keep(0, 3 * PAGE_TOKENS)
    assert pool.pages_used == 4, "whole pages are shared"
    pool.clear(0)
    assert pool.pages_used == 3
    pool.resume(1, kept)
    with pytest.raises(MemoryError, match="no page is left: 5 of 32 tokens are in use"):
        pool.prefill([2], [[1] * (2 * PAGE_TOKENS + 1)])
    pool.clear(1)
    pool.clear(2)
    del kept
    assert pool.pages_used == 0


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo tells what the processor has: runs on Linux"
)
def test_a_narrower_processor_computes_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight lanes instead of sixteen, as the compiler would make them for AVX2: no bit less exact than the others."""
    want = {name: run(pool_of(make(name), 6, 2), 5, 75, 3) for name in SHAPES}
    compiler = tmp_path / "narrow"
    words = "-mavx2 -mfma" if " avx2 " in Path("/proc/cpuinfo").read_text() else ""
    script = f'for word; do shift; [ "$word" = -march=native ] && word="{words}"; set -- "$@" $word; done'
    compiler.write_text(f'#!/bin/sh\n{script}\nexec {find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    try:
        for name, logits in want.items():
            got = run(pool_of(make(name), 6, 2), 5, 75, 3)
            np.testing.assert_allclose(got, logits, rtol=0, atol=2e-2 * np.abs(logits).max())
            assert np.abs(got - logits).mean() < 2e-3 * np.abs(logits).max()
    finally:
        library.cache_clear()
