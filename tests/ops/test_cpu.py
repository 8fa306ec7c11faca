"""The build of the kernels and their edges; what they compute is compared with the decoder in tests/engine."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from thinkfast.engine.backends import open_backend
from thinkfast.engine.sampling import SamplingParams
from thinkfast.engine.slots import SlotTable
from thinkfast.model.config import DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.ops.cpu.build import BuildError, build, cache_directory, find_compiler
from thinkfast.ops.cpu.native import NativeModel, NativePool, Shape


def test_a_library_is_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "thinkfast"
    compiler = tmp_path / "counting"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    first = build()
    assert build() == first
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if call != "--version"] == [calls[1]]
    assert [path.name for path in cache_directory().iterdir()] == [first.name], "nothing half made is left"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 7", "failed: exit status 7"),
        ('[ "$1" = --version ] || { echo "x.h:1: error: no" >&2; exit 1; }', "failed: x.h:1: error: no"),
    ],
)
def test_a_compiler_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=words):
        build()


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: looked for no-such-compiler"):
        build()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "thinkfast").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=f"cannot write {tmp_path}/thinkfast/decode-"):
        build()


def test_the_sources_compile_without_warnings(tmp_path: Path) -> None:
    source = Path(sys.modules["thinkfast.ops.cpu.build"].__file__ or "").parent / "decode.cpp"
    command = [
        find_compiler(),
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Werror",
        "-fsyntax-only",
        str(source),
    ]
    subprocess.run(command, check=True)


def hybrid(scale: float) -> Decoder:
    torch.manual_seed(3)
    shape = MambaConfig(n_heads=4, head_dim=8, d_state=8, n_groups=2)
    model = Decoder(DecoderConfig(40, 32, 48, 4, 2, 8, ("mamba", "attention"), shape, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in name for part in ("gate_proj", "in_proj", "q_proj", "conv1d", "dt_bias")):
                value.mul_(scale)
    return model


def logits_of(model: Decoder, ids: np.ndarray) -> np.ndarray:
    rows, length = ids.shape
    memory = open_backend(model, "native", "float32").memory(rows, length)
    table = SlotTable(rows, SamplingParams(), 40, ())
    table.active[:] = True
    out = np.empty((length, rows, 40), np.float32)
    for t in range(length):
        table.token[:], table.position[:] = ids[:, t], t
        memory.step(table, np.arange(rows, dtype=np.int32), out[t])
    return out.swapaxes(0, 1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_extreme_gates_steps_and_scores(scale: float) -> None:
    """Saturated SiLU and softplus, decays of zero and one, one-hot attention."""
    model = hybrid(scale)
    ids = np.random.default_rng(0).integers(0, 40, (4, 30))
    with torch.no_grad():
        want = model.double()(torch.from_numpy(ids)).numpy() if scale > 1 else model(torch.from_numpy(ids)).numpy()
    got = logits_of(model.float(), ids)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-4 * np.abs(want).max())


def test_arrays_of_the_wrong_kind_are_refused() -> None:
    torch.manual_seed(0)
    tensors = {
        "embed_tokens.weight": torch.randn(10, 8),
        "norm.weight": torch.ones(8),
        "head": torch.randn(10, 8),
    }
    shape = Shape(10, 8, 8, 2, 2, 4, (), 1e-5)
    pool = NativePool(NativeModel(shape, tensors, None), 2, 4, half=False, threads=1)
    i32 = np.zeros(2, np.int32)
    keys, counters = np.zeros(2, np.uint64), np.zeros(2, np.int64)
    logits = np.empty((2, 10), np.float32)
    tokens, _ = pool.step(np.arange(2, dtype=np.int32), i32, i32, keys, counters, 0.0, 0, 1.0, logits)
    row = tensors["embed_tokens.weight"][0]
    want = tensors["head"] @ (row * torch.rsqrt(row.pow(2).mean() + 1e-5))
    np.testing.assert_allclose(logits[1], want.numpy(), rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == [int(want.argmax())] * 2
    with pytest.raises(ValueError, match="expected 2 contiguous int32, got 2 int64"):
        pool.step(i32, i32.astype(np.int64), i32, keys, counters, 0.0, 0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 2 contiguous uint64, got 1 uint64"):
        pool.step(i32, i32, i32, keys[:1], counters, 0.0, 0, 1.0)
    with pytest.raises(ValueError, match="logits must be float32"):
        pool.step(i32, i32, i32, keys, counters, 0.0, 0, 1.0, np.empty((2, 9), np.float32))


def test_memory_that_does_not_exist_is_refused() -> None:
    backend = open_backend(hybrid(1.0), "native")
    with pytest.raises(MemoryError, match="2000000000 slots of 2000 tokens do not fit"):
        NativePool(backend.model, 2_000_000_000, 2000, half=False, threads=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork: runs on Linux")
def test_a_forked_child_decodes_without_the_parents_threads() -> None:
    """In its own process: forking this one would copy pytest's state."""
    code = """
import os, torch
torch.set_num_threads(2)
from thinkfast.engine import Engine, SamplingParams
from thinkfast.model.config import DecoderConfig
from thinkfast.model.decoder import Decoder
model = Decoder(DecoderConfig(40, 32, 48, 4, 2, 8, ("attention",))).eval()
engine = Engine(model, slots=32, backend="native")
def draw():
    return [s.token_ids for row in engine.sample([[1, 2], [3]], 20, SamplingParams(max_tokens=8)) for s in row]
want = draw()
child = os.fork()
if child == 0:
    os._exit(0 if draw() == want else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True, timeout=60)
