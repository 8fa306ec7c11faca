"""`thinkfast export` as it is typed: wrong input is one line and status 2, and leaves nothing half written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from thinkfast.cli import main
from thinkfast.model.config import DISCRETE, MambaConfig

pytest.importorskip("gguf", reason="gguf is not installed: the extra dev, with `make test`")
pytest.importorskip(
    "transformers",
    minversion="5.23.0",
    reason="older transformers norm over all groups; `make test` installs a newer one",
)
Make = Callable[..., Path]
ONE = MambaConfig(n_heads=4, head_dim=16, d_state=16, n_groups=1, chunk_size=16)


def sharded(source: Path, target: Path) -> Path:
    """A model in two shards, of which one is missing."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {tensor: names[index % 2] for index, tensor in enumerate(sorted(tensors))}
    save_file({name: tensors[name] for name, shard in where.items() if shard == names[0]}, target / names[0])
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return target


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says before it ends with status 2."""
    assert main(["export", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_model_that_cannot_be_written(
    make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    out = tmp_path / "new" / "out"
    for source, expected in {
        sharded(make_model("hybrid"), tmp_path / "shards"): "/model.safetensors.index.json: weight_map names missing "
        "files: model-00002-of-00002.safetensors",
        make_model(
            "hybrid", mamba=replace(ONE, kind=DISCRETE)
        ): "the layers are Discrete Mamba-2, which no stock layout can express: distil the teacher into Mamba-2 layers",
        tmp_path / "nothing": "/nothing: no such model directory",
    }.items():
        line = refused([str(source), str(out), "--format", form], capsys)
        assert line.startswith(f"thinkfast: {source}")
        assert expected in line
        assert not out.parent.exists()


@pytest.mark.parametrize(
    ("form", "dtype", "expected"),
    [
        ("hf", "q8_0", "dtype is 'q8_0', expected one of float32, float16, bfloat16 for the format hf"),
        ("gguf", "float64", "dtype is 'float64', expected one of float32, float16, bfloat16, q8_0 for the format gguf"),
        ("onnx", "float32", "format is 'onnx', expected one of hf, gguf"),
    ],
)
def test_a_dtype_or_format_that_is_not_there(
    make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, dtype: str, expected: str
) -> None:
    out = tmp_path / "new" / "out"
    line = refused([str(make_model("hybrid")), str(out), "--format", form, "--dtype", dtype], capsys)
    assert line == f"thinkfast: {expected}"
    assert not out.parent.exists()


@pytest.mark.parametrize(("form", "dtype"), [("hf", "float16"), ("gguf", "float16"), ("gguf", "q8_0")])
def test_values_that_a_dtype_cannot_hold(
    make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, dtype: str
) -> None:
    source = tmp_path / "large"
    source.mkdir()
    for file in make_model("hybrid").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e9
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    line = refused([str(source), str(tmp_path / "new" / "out"), "--format", form, "--dtype", dtype], capsys)
    assert f"holds values that are not finite in {dtype}, choose another dtype" in line
    assert not (tmp_path / "new").exists()


def test_qk_norm_is_told_from_what_llama_cpp_has(
    make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([str(make_model("qwen3")), str(tmp_path / "m.gguf"), "--format", "gguf"], capsys)
    assert line.endswith(
        "queries and keys are normed, which this writer does not express: llama.cpp's own converter reads the "
        "directory as it is"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_what_is_there_already_stays(make_model: Make, tmp_path: Path, form: str) -> None:
    """The program itself, in a process of its own."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    command = [sys.executable, "-m", "thinkfast", "export", str(make_model("llama")), str(out), "--format", form]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    kind = {"hf": "directory", "gguf": "file"}[form]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"thinkfast: {out} exists, expected a new {kind}\n"
    assert [(entry.name, entry.is_dir()) for entry in tmp_path.iterdir()] == [("out", True)]
    assert (out / "notes.txt").read_text() == "mine"


def test_arguments_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "OUT is missing" in refused(["bundled"], capsys)
    out = tmp_path / "m.gguf"
    line = refused(["bundled", str(out), "--format", "gguf", "--compat"], capsys)
    assert line == "thinkfast: --compat is about transformers, expected the format hf"
    (tmp_path / "file").write_text("mine")
    for form in ("hf", "gguf"):
        line = refused(["bundled", str(tmp_path / "file" / "out"), "--format", form], capsys)
        assert f"{tmp_path}/file is a file, expected a directory" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
