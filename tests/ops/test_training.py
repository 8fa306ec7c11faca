"""The kernels for training against the plain torch path in float64, values and every gradient."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinkfast.model.attention import Attention
from thinkfast.model.config import DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.layers import RMSNorm, SwiGLU
from thinkfast.model.mamba2 import Mamba2
from thinkfast.ops.cpu import training
from thinkfast.ops.cpu.build import build

CLOSE = 1e-5  # of the largest value; rounding leaves a tenth of it, a missing term of one tap or one pair 1e-3 and more


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels, also for few rows, and a count of threads that is put back."""
    build("train")
    monkeypatch.setattr(training, "MIN_ROWS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def mamba(heads: int, width: int, state: int, groups: int, taps: int, chunk: int) -> Mamba2:
    shape = MambaConfig(heads, width, state, groups, d_conv=taps, chunk_size=chunk)
    layer = Mamba2(DecoderConfig(8, 48, 32, 2, 2, 24, ("mamba",), mamba=shape))
    with torch.no_grad():
        layer.in_proj.weight.mul_(3)
        for weight in (layer.norm.weight, layer.D, layer.conv1d.bias):
            assert weight is not None
            weight.add_(torch.randn_like(weight) / 2)
    return layer


class Half(nn.Module):
    """A norm and what stands behind it, with the residual; refuses to run in several calls."""

    def __init__(self, inner: SwiGLU | Mamba2) -> None:
        super().__init__()
        self.norm, self.inner = RMSNorm(48, 1e-5), inner
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        alone = training.usable(x, self.norm.weight)
        with pytest.MonkeyPatch.context() as patch:
            if alone:
                patch.setattr(self.norm, "forward", lambda _: pytest.fail("the half of the layer is not one call"))
            out: Tensor = self.inner.added(x, self.norm)
        return out


def run(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every weight."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(upstream)
    return [out.detach(), *(t.grad for t in (x, *module.parameters()) if t.grad is not None)]


def compare(module: nn.Module, x: Tensor) -> None:
    """As close to float64 as the plain path in float32 is, give or take: norms of small numbers amplify rounding."""
    oracle, plain, upstream = deepcopy(module).double(), deepcopy(module), torch.randn_like(x)
    found, expected = run(module, x, upstream), run(oracle, x.double(), upstream.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "usable", lambda *_: False)
        rounded = run(plain, x, upstream)
    assert len(found) == len(expected) == 2 + len(list(module.parameters()))
    for one, other, third in zip(found, expected, rounded, strict=True):
        allowed = max(CLOSE * float(other.abs().max()), 3 * float((third - other).abs().max()))
        assert float((one - other).abs().max()) <= allowed <= 1e-3 * float(other.abs().max())


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ((4, 32, 32, 4, 4, 32), 77),
        ((4, 16, 32, 2, 4, 32), 70),
        ((4, 32, 16, 1, 3, 64), 64),
        ((2, 64, 48, 1, 4, 16), 21),
        ((2, 16, 16, 2, 2, 24), 33),
        ((2, 16, 16, 2, 4, 256), 130),
    ],
)
def test_the_mixer(sizes: tuple[int, int, int, int, int, int], length: int) -> None:
    torch.manual_seed(length)
    layer = mamba(*sizes)
    x = torch.randn(3, length, 48)
    assert layer._fused(x) is not None
    compare(layer, x)
    assert layer.double()._fused(x.double()) is None


def test_the_mixer_behind_a_large_decay() -> None:
    """The sum of the log decays is -1e5, where floats lie .008 apart, and the differences behind it are about .3."""
    torch.manual_seed(1)
    layer = mamba(2, 16, 16, 2, 4, 64)
    with torch.no_grad():
        layer.A_log.fill_(1.0)
        layer.dt_bias.fill_(-2.0)
        layer.in_proj.weight[-2:].fill_(0)
        layer.in_proj.weight[-2:, 0] = 1
        x = torch.randn(2, 64, 48)
        x[:, :, 0] = 0
        x[:, 8, 0] = 4e4
        found, expected = layer(x), deepcopy(layer).double()(x.double())
        assert float((found - expected)[:, 9:].abs().max()) <= CLOSE * float(expected[:, 9:].abs().max())


def test_norm_and_swiglu() -> None:
    torch.manual_seed(2)
    norm = RMSNorm(48, 1e-5)
    nn.init.normal_(norm.weight)
    for module in (norm, SwiGLU(48, 80)):
        compare(module, torch.randn(3, 67, 48) * 3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "length", "qk_norm"),
    [(4, 2, 32, 77, False), (2, 2, 64, 32, True), (3, 1, 32, 130, True)],
)
def test_attention(heads: int, kv_heads: int, width: int, length: int, qk_norm: bool) -> None:
    torch.manual_seed(length)
    kinds = ("attention",)
    layer = Attention(DecoderConfig(8, 48, 32, heads, kv_heads, width, kinds, qkv_bias=True, qk_norm=qk_norm))
    with torch.no_grad():
        layer.q_proj.weight.mul_(3)
    compare(layer, torch.randn(3, length, 48))


@pytest.mark.parametrize("sizes", [(48, 72), (40, 80), (8, 16)])
def test_widths_that_are_no_whole_vectors_take_the_plain_path(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "swiglu", lambda *_: pytest.fail("a kernel would write behind its memory"))
    compare(SwiGLU(*sizes), torch.randn(2, 67, sizes[0]))


def test_numbers_do_not_depend_on_threads() -> None:
    torch.manual_seed(4)
    layer = mamba(4, 16, 16, 4, 4, 32)
    bias = layer.conv1d.bias
    assert bias is not None
    weights = [t.detach() for t in (layer.conv1d.weight, bias, layer.dt_bias, layer.A_log, layer.D, layer.norm.weight)]
    shape = training.MixerShape(4, 16, 16, 4, 4, 32, 1e-5)
    rows, found = torch.randn(5, 130, layer.in_proj.out_features), []
    halves = Half(layer), Half(SwiGLU(48, 80))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = [t.clone().requires_grad_() for t in (rows, *weights)]
        out = training.mixer(given[0], given[1:], shape)
        out.backward(torch.ones_like(out))
        x, scale = rows.clone().requires_grad_(), torch.ones(rows.shape[-1] // 16 * 16).requires_grad_()
        training.rms_norm(x[..., : len(scale)], scale, 1e-5).sum().backward()
        found.append([out.detach(), *(t.grad for t in (*given, x, scale) if t.grad is not None)])
        for half in halves:
            half.zero_grad()
            found[-1] += run(half, rows[..., :48], rows[..., 48:96])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_without_a_compiler_the_plain_path_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    layer, x = mamba(2, 16, 16, 2, 4, 32), torch.randn(2, 40, 48)
    upstream = torch.randn_like(x)
    fast = run(layer, x, upstream)
    layer.zero_grad()
    monkeypatch.setattr(training, "_library", lambda: None)
    assert layer._fused(x) is None
    for one, other in zip(run(layer, x, upstream), fast, strict=True):
        assert float((one - other).abs().max()) <= 2 * CLOSE * float(one.abs().max())


@pytest.mark.parametrize(("length", "rows"), [(70, 1), (200, 3)])
def test_the_feed_forward_half_of_a_layer(length: int, rows: int) -> None:
    """Up to two parts of four tiles, the last of them cut off."""
    torch.manual_seed(length)
    half = Half(SwiGLU(48, 80))
    compare(half, torch.randn(rows, length, 48))


@pytest.mark.parametrize(
    ("sizes", "length"), [((4, 32, 32, 4, 4, 32), 77), ((3, 16, 32, 1, 4, 32), 150), ((2, 32, 16, 2, 3, 64), 200)]
)
def test_the_mixer_half_of_a_layer(sizes: tuple[int, int, int, int, int, int], length: int) -> None:
    torch.manual_seed(length)
    compare(Half(mamba(*sizes)), torch.randn(3, length, 48))


HALVES: list[Callable[[], SwiGLU | Mamba2]] = [lambda: SwiGLU(48, 80), lambda: mamba(4, 16, 16, 2, 4, 32)]


@pytest.mark.parametrize("made", HALVES, ids=["feed-forward", "mixer"])
def test_activations_that_are_computed_again(made: Callable[[], SwiGLU | Mamba2]) -> None:
    """The half is run twice before its gradients are taken, and its graph is used twice."""
    torch.manual_seed(7)
    half, x = Half(made()), torch.randn(2, 90, 48)
    upstream = torch.randn_like(x)
    once = run(half, x, upstream)
    half.zero_grad()
    again = x.clone().requires_grad_()
    checkpoint(half, again, use_reentrant=False).backward(upstream)
    assert torch.equal(once[1], again.grad)
    assert all(torch.equal(one, t.grad) for one, t in zip(once[2:], half.parameters(), strict=True))
    out = half(again)
    first, second = (torch.autograd.grad(out, [again, *half.parameters()], upstream, retain_graph=True) for _ in "ab")
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(first, once[1:], strict=True))


@pytest.mark.parametrize("made", HALVES, ids=["feed-forward", "mixer"])
def test_weights_that_do_not_fit_into_a_cache_take_several_calls(
    made: Callable[[], SwiGLU | Mamba2], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(8)
    half, x = Half(made()), torch.randn(2, 70, 48)
    upstream = torch.randn_like(x)
    expected = run(half, x, upstream)
    half.zero_grad()
    monkeypatch.setattr(training, "MAX_WEIGHTS", 0)
    monkeypatch.setattr(Half, "forward", lambda self, x: self.inner.added(x, self.norm))
    for name in ("through",):
        monkeypatch.setattr(training, name, lambda *_: pytest.fail("one call for too many weights"))
    for one, other in zip(run(half, x, upstream), expected, strict=True):
        assert float((one - other).abs().max()) <= 2 * CLOSE * float(other.abs().max())


def test_layers_in_a_row_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """As layer by layer, which is how activations are computed again, and as without gradients."""
    torch.manual_seed(9)
    shape = MambaConfig(2, 16, 16, 2, chunk_size=32)
    kinds = ("mamba", "mamba", "attention", "mamba")
    model = Decoder(DecoderConfig(8, 48, 32, 2, 2, 32, kinds, mamba=shape))
    ids, seen, found = torch.randint(8, (2, 70)), list[int](), []
    whole = training.through

    def through(x: Tensor, halves: Sequence[training.Half], *given: Any) -> Tensor:
        seen.append(len(halves))
        return whole(x, halves, *given)

    monkeypatch.setattr(training, "through", through)
    for model.recompute in (False, True):
        model.zero_grad()
        out = model(ids)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    assert seen == [4, 1, 2, *[1] * 7, *[1] * 7]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(model(ids), found[0][0])


def test_documents_in_one_row_are_as_each_alone() -> None:
    torch.manual_seed(10)
    shape = MambaConfig(2, 16, 16, 2, chunk_size=32)
    model = Decoder(DecoderConfig(8, 48, 32, 2, 2, 32, ("mamba", "attention", "mamba"), mamba=shape))
    ids, bounds = torch.randint(8, (1, 140)), torch.tensor([0, 37, 38, 140])
    found = []
    for pieces in ([model.hidden(ids, bounds=bounds)], [model.hidden(part) for part in ids.split([37, 1, 102], 1)]):
        model.zero_grad()
        out = torch.cat(pieces, 1)
        out.square().mul(torch.arange(1, 49)).sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert float((one - other).abs().max()) <= 2 * CLOSE * float(other.abs().max())
