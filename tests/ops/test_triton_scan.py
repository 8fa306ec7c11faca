"""The fused scan against the recurrence in float64, values and gradients, alone and inside a model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: the extra dev, with `make test`, on Linux")

from thinkfast.model import mamba2
from thinkfast.model.cache import new_cache
from thinkfast.model.config import DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.ops.ssd import ssd_chunked, ssd_naive
from thinkfast.ops.triton import chunked_scan, runs, usable
from thinkfast.ops.triton.scan import ssd_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def inputs(batch: int, length: int, heads: int, groups: int, head_dim: int, d_state: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": F.softplus(normal(batch, length, heads)),
        "A": -torch.exp(normal(heads)),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(heads),
        "state": normal(batch, heads, head_dim, d_state),
    }


def with_gradients(scan, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    y, last = scan(**leaves)
    for at, out in enumerate((y, last)):
        generator = torch.Generator().manual_seed(at)
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        (out * weight).sum().backward(retain_graph=True)
    return {"y": y.detach(), "last": last.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in want.items():
        wrong = (got[name].double() - tensor).norm() / tensor.norm()
        assert wrong <= tolerance, name


@pytest.mark.parametrize(
    ("sizes", "chunk", "with_state"),
    [
        ((1, 1, 1, 1, 1, 1), 64, True),  # one of everything
        ((2, 37, 2, 1, 3, 5), 16, True),  # two whole chunks and a part of one, padded widths
        ((1, 19, 4, 2, 18, 20), 5, False),  # the chunk rounded up to 16, no first state
        ((1, 16, 3, 3, 33, 16), 16, True),  # a head's channels in two programs
    ],
)
def test_values_and_gradients(sizes: tuple[int, ...], chunk: int, with_state: bool) -> None:
    tensors = inputs(*sizes)
    if not with_state:
        del tensors["state"]
    want = with_gradients(ssd_naive, tensors, torch.float64)
    assert_same(with_gradients(partial(ssd_fused, chunk=chunk), tensors, torch.float32), want, 1e-5)


def test_small_decays_after_a_large_one_are_not_lost() -> None:
    tensors = inputs(1, 16, 1, 1, 2, 2)
    tensors["dt"][:, 3] = 2000.0
    tensors["x"][:, 3] *= 1e-3
    want = ssd_naive(**tensors)
    got = ssd_fused(**{name: tensor.float() for name, tensor in tensors.items()})
    for one, other in zip(got, want, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 2e-6


def test_without_gradients_no_states_are_kept_and_values_are_the_same() -> None:
    tensors = {name: tensor.float() for name, tensor in inputs(1, 20, 2, 1, 4, 4).items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    for one, other in zip(ssd_fused(**tensors, chunk=16), ssd_fused(**leaves, chunk=16), strict=True):
        assert torch.equal(one, other.detach())


def test_too_wide_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 129 and d_state 2, expected at most 128"):
        ssd_fused(**{name: tensor.float() for name, tensor in inputs(1, 1, 1, 1, 129, 2).items()})


def test_a_model_trains_and_prefills_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        layer_types=("mamba",),
        mamba=MambaConfig(2, 4, 3, 1),
    )
    model = Decoder(config).to(DEVICE)
    ids = torch.tensor([[1, 2, 3, 4, 5]], device=DEVICE)
    outputs, calls = [], []

    def fused(like: Tensor, width: int):
        calls.append(width)
        return ssd_fused

    for choose in (lambda like, width: ssd_chunked, fused):
        monkeypatch.setattr(mamba2, "chunked_scan", choose)
        model.zero_grad()
        logits = model(ids)
        logits.pow(2).sum().backward()
        cache = new_cache(config, 1, 8, torch.float32, DEVICE)
        with torch.inference_mode():
            model(ids[:, :2], cache)
            later = model(ids[:, 2:], cache)
        outputs.append([logits.detach(), later, *(p.grad.clone() for p in model.parameters())])
    assert calls == [4, 4, 4]
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_on_the_cpu_nothing_changes() -> None:
    like = torch.zeros(1)
    assert chunked_scan(like, 4) is ssd_chunked
    assert not usable(like.device)


def test_the_interpreter_counts_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runs(torch.device("cpu"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not runs(torch.device("cpu"))
