"""Several documents in one row: outputs and gradients are those of the documents alone, none sees another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thinkfast.model.config import ATTENTION, DISCRETE, MAMBA, MAMBA1, MAMBA2, DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.ops.cpu import training
from thinkfast.ops.cpu.build import build

SIZES = [1, 37, 2, 70, 3, 1, 20]  # shorter than the convolution, as long as no chunk, longer than two of them
BOUNDS = torch.tensor([0, *SIZES]).cumsum(0)
PATHS = ("plain", "kernels")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain torch, or the kernels for training, also for few rows."""
    if request.param == "kernels":
        build("train")
        monkeypatch.setattr(training, "MIN_ROWS", 1)
    else:
        monkeypatch.setattr(training, "usable", lambda *_: False)
    return str(request.param)


def model_of(kind: str, groups: int = 2) -> Decoder:
    torch.manual_seed(3)
    d_state = 16 if kind == MAMBA1 else 32
    shape = MambaConfig(2, 32, d_state, groups, chunk_size=32, kind=kind)
    model = Decoder(DecoderConfig(40, 48, 64, 2, groups, 32, (MAMBA, ATTENTION, MAMBA), shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


def gradients(model: Decoder, logits: Tensor, upstream: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits.backward(upstream)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", [MAMBA2, DISCRETE, MAMBA1])
def test_a_packed_row_is_its_documents_alone(path: str, kind: str) -> None:
    model = model_of(kind)
    ids = torch.randint(0, 40, (1, sum(SIZES)))
    packed = torch.nn.functional.linear(model.hidden(ids, bounds=BOUNDS), model.head_weight)
    upstream = torch.randn_like(packed)
    found = gradients(model, packed, upstream)
    packed = packed.detach()
    alone = torch.cat([model(part) for part in ids.split(SIZES, 1)], 1)
    wanted = gradients(model, alone, upstream)
    alone = alone.detach()
    assert float((packed - alone).abs().max()) <= 2e-6 * float(alone.abs().max())
    assert len(found) == len(wanted) == len(list(model.parameters()))
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())
    # Were any of them read on from document to document, all this would be far apart.
    joined = model(ids).detach()
    assert float((joined - alone).abs().max()) > 1e-2 * float(alone.abs().max())


@pytest.mark.parametrize("kind", [MAMBA2, DISCRETE, MAMBA1])
def test_a_changed_token_changes_its_own_document_and_no_other(path: str, kind: str) -> None:
    model = model_of(kind)
    ids = torch.randint(0, 40, (1, sum(SIZES)))
    with torch.no_grad():
        before = model.hidden(ids, bounds=BOUNDS)
        for document, (start, end) in enumerate(zip(BOUNDS[:-1].tolist(), BOUNDS[1:].tolist(), strict=True)):
            other = ids.clone()
            other[0, start] = (other[0, start] + 1) % 40
            after = model.hidden(other, bounds=BOUNDS)
            same = (before == after)[0].all(-1)
            assert same[:start].all(), document
            assert same[end:].all(), document
            assert not same[start:end].any(), document


def test_recomputed_activations_are_packed_alike() -> None:
    model, ids = model_of(MAMBA2), torch.randint(0, 40, (1, sum(SIZES)))
    found = []
    for model.recompute in (False, True):
        hidden = model.hidden(ids, bounds=BOUNDS)
        found.append(gradients(model, hidden, torch.ones_like(hidden)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("rows", "bounds"), [(1, [0, 5]), (1, [1, 8]), (1, [0, 4, 4, 8]), (1, [0, 6, 4, 8]), (2, [0, 4, 8])]
)
def test_bounds_that_do_not_divide_the_row_are_refused(rows: int, bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="do not divide a batch of shape"):
        model_of(MAMBA2).hidden(torch.zeros(rows, 8, dtype=torch.int64), bounds=torch.tensor(bounds))
