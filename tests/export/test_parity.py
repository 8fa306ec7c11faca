"""The parity check finds what it is there for, in this version of transformers and in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from thinkfast.errors import BadInput
from thinkfast.export import parity
from thinkfast.export.hf import export_hf
from thinkfast.export.parity import Differs, check

pytest.importorskip(
    "transformers",
    minversion="5.23.0",
    reason="older transformers norm over all groups; `make test` installs a newer one",
)
Make = Callable[..., Path]
OTHERS = os.environ.get("THINKFAST_COMPAT", "").split()


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rms_norm_eps": 0.5}, "the logits are off by"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rope_scaling": None}, "the logits are off"),
    ],
)
def test_another_model_is_noticed(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, what: str
) -> None:
    """`transformers` reads a directory that says something else than ours."""
    ours = make_model("hybrid")
    theirs = copied(ours, tmp_path / "model")
    raw = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(raw | changes))
    load = parity.load_model
    monkeypatch.setattr(parity, "load_model", lambda path: load(ours if Path(path) == theirs else path))
    with pytest.raises(Differs, match=what):
        check(theirs)


def test_without_transformers_nothing_is_begun(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "installed_version", lambda: (0,))
    monkeypatch.setattr("thinkfast.export.hf.load_model", None)
    with pytest.raises(BadInput, match=r"transformers is not installed, .*: pip install 'thinkfast\[export\]'"):
        export_hf(make_model("pure"), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_unexpected_tensors_are_noticed(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_model("hybrid")
    theirs = copied(ours, tmp_path / "model")
    tensors = load_file(theirs / "model.safetensors")
    del tensors["model.layers.0.mamba.D"]
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    load = parity.load_model
    monkeypatch.setattr(parity, "load_model", lambda path: load(ours if Path(path) == theirs else path))
    with pytest.raises(Differs, match=r"missing keys in transformers: model\.layers\.0\.mamba\.D"):
        check(theirs)


def test_the_program_tells_of_every_directory(make_model: Make) -> None:
    good, bad = make_model("pure"), make_model("pure").parent / "nothing"
    done = subprocess.run(
        [sys.executable, "-m", "thinkfast.export.parity", good, bad], capture_output=True, text=True, check=False
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert first["generated"] > 0
    assert "no such directory" in second["error"]


@pytest.mark.compat
@pytest.mark.skipif(not OTHERS, reason="no interpreters with other transformers are named: `make compat`")
@pytest.mark.parametrize("python", OTHERS)
def test_other_versions_of_transformers(make_model: Make, tmp_path: Path, python: str) -> None:
    """One group: as in the newest. More groups: wrong without an error, which the check finds and explains."""
    alike = (
        "llama",
        "llama3",
        "qwen2",
        "qwen3",
        "hybrid",
        "hybrid-bias",
        "hybrid-untied-scaled",
        "hybrid-no-positions",
        "pure",
    )
    for name in (*alike, "groups", "pure-groups"):
        export_hf(make_model(name), tmp_path / name, compat=name in alike)
    done = subprocess.run(
        [python, "-W", "ignore", "-m", "thinkfast.export.parity", *(str(path) for path in sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(parity.__file__).parents[2])},
    )
    found = {Path(row["directory"]).name: row for row in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {*alike, "groups", "pure-groups"}, done.stderr
    for name in alike:
        assert "error" not in found[name], found[name]
        assert found[name]["transformers"] != check(tmp_path / name).transformers
        worst = max(found[name][key] for key in ("logits", "cached", "padded", "reloaded"))
        assert worst < 1e-4 * found[name]["scale"]
    for name in ("groups", "pure-groups"):
        assert "with 4 groups it needs transformers 5.23" in found[name]["error"]


def test_a_left_padded_row_is_really_compared(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias in the projection of a Mamba layer breaks padding alone; a mask that is ignored does the same."""
    load = parity._load

    def without_mask(path: Path):
        stock = load(path)
        forward = stock.forward

        def unmasked(*arguments: object, **named: object):
            mask = named.get("attention_mask")
            if isinstance(mask, torch.Tensor):
                named["attention_mask"] = torch.ones_like(mask)
            return forward(*arguments, **named)

        stock.forward = unmasked
        return stock

    monkeypatch.setattr(parity, "_load", without_mask)
    with pytest.raises(Differs, match="the logits of a padded row"):
        check(make_model("hybrid"))
