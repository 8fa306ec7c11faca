"""The mixer against its definition written out, and decoding against the full forward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thinkfast.model.cache import MambaCache, empty_mamba_cache
from thinkfast.model.config import MAMBA, DecoderConfig, MambaConfig
from thinkfast.model.mamba2 import Mamba2

HIDDEN = 12


def mixer(n_groups: int, dtype: torch.dtype = torch.float64) -> Mamba2:
    torch.manual_seed(3)
    config = DecoderConfig(
        vocab_size=7,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        layer_types=(MAMBA,),
        mamba=MambaConfig(n_heads=4, head_dim=6, d_state=5, n_groups=n_groups, chunk_size=8),
    )
    module = Mamba2(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module.to(dtype)


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values) + 1e-5)


def by_definition(module: Mamba2, u: Tensor) -> Tensor:
    """One row u (L, D), in plain numbers: projections, taps, recurrence and norm as loops."""
    shape = module.shape
    inner, width = shape.d_inner, shape.n_groups * shape.d_state
    weight = module.in_proj.weight
    taps, bias = module.conv1d.weight[:, 0], module.conv1d.bias
    A = -module.A_log.exp()
    state = torch.zeros(shape.n_heads, shape.head_dim, shape.d_state, dtype=u.dtype)
    history: list[Tensor] = []
    out = []
    for row in u:
        projected = weight @ row
        z, channels, dt = projected[:inner], projected[inner : inner + shape.conv_dim], projected[-shape.n_heads :]
        history.append(channels)
        mixed = bias.clone()
        for back in range(min(shape.d_conv, len(history))):
            mixed += taps[:, shape.d_conv - 1 - back] * history[-1 - back]
        mixed = mixed * torch.sigmoid(mixed)
        x, B, C = mixed[:inner], mixed[inner : inner + width], mixed[inner + width :]
        y = torch.zeros(inner, dtype=u.dtype)
        for h in range(shape.n_heads):
            group = h * shape.n_groups // shape.n_heads
            span = slice(group * shape.d_state, (group + 1) * shape.d_state)
            place = slice(h * shape.head_dim, (h + 1) * shape.head_dim)
            step = torch.log1p(torch.exp(dt[h] + module.dt_bias[h]))
            state[h] = torch.exp(step * A[h]) * state[h] + step * torch.outer(x[place], B[span])
            y[place] = state[h] @ C[span] + module.D[h] * x[place]
        y = y * z * torch.sigmoid(z)
        size = inner // shape.n_groups
        for start in range(0, inner, size):
            y[start : start + size] /= rms(y[start : start + size].tolist())
        out.append(module.out_proj.weight @ (y * module.norm.weight))
    return torch.stack(out)


@pytest.mark.parametrize("n_groups", [1, 2, 4])
@torch.no_grad()
def test_equals_the_definition(n_groups: int) -> None:
    module = mixer(n_groups)
    u = torch.randn(2, 19, HIDDEN, dtype=torch.float64)
    want = torch.stack([by_definition(module, row) for row in u])
    # The module itself computes in float32 wherever the checkpoint's dtype is not what counts.
    assert torch.allclose(module(u), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [[1] * 21, [21], [5, 1, 1, 9, 2, 3], [2, 19], [1, 20]])
@torch.no_grad()
def test_cached_parts_equal_the_full_forward(parts: list[int]) -> None:
    module = mixer(2, torch.float32)
    u = torch.randn(3, 21, HIDDEN)
    cache = empty_mamba_cache(module.shape, 3, "cpu")
    conv, state = cache.conv, cache.state
    got = torch.cat([module(part, cache) for part in u.split(parts, dim=1)], dim=1)
    assert torch.allclose(got, module(u), rtol=1e-4, atol=1e-5)
    assert cache.conv is conv
    assert cache.state is state
    assert state.abs().max() > 0.1


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    module = mixer(4, torch.float32)
    u = torch.randn(2, 9, HIDDEN)
    together = module(u)
    assert torch.allclose(together[1:], module(u[1:]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_forked_row_goes_on_alone() -> None:
    module = mixer(2, torch.float32)
    prompt, tails = torch.randn(2, 6, HIDDEN), torch.randn(3, 4, HIDDEN)
    source = empty_mamba_cache(module.shape, 2, "cpu")
    module(prompt, source)
    target: MambaCache = empty_mamba_cache(module.shape, 4, "cpu")
    target.copy_rows(source, torch.tensor([1, 1, 0]), torch.tensor([3, 0, 2]))
    rows = torch.randn(4, 4, HIDDEN)
    rows[torch.tensor([3, 0, 2])] = tails
    got = module(rows, target)
    for tail, row, origin in zip(tails, (3, 0, 2), (1, 1, 0), strict=True):
        want = module(torch.cat((prompt[origin], tail))[None])[0, 6:]
        assert torch.allclose(got[row], want, rtol=1e-4, atol=1e-5)


def test_a_half_precision_mixer_keeps_its_dtype_and_a_single_precision_state() -> None:
    module = mixer(2, torch.float32)
    u = torch.randn(1, 12, HIDDEN)
    want = module(u)
    half = module.to(torch.bfloat16)
    cache = empty_mamba_cache(half.shape, 1, "cpu")
    with torch.no_grad():
        got = half(u.bfloat16(), cache)
    assert got.dtype == torch.bfloat16
    assert cache.state.dtype == torch.float32
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


def test_initial_values_are_in_the_published_ranges() -> None:
    torch.manual_seed(0)
    shape = MambaConfig(n_heads=4096, head_dim=1, d_state=1, n_groups=1)
    config = DecoderConfig(7, HIDDEN, 8, 2, 1, 4, (MAMBA,), shape)
    module = Mamba2(config)
    A = module.A_log.exp()
    dt = torch.nn.functional.softplus(module.dt_bias)
    assert 1 <= A.min() < 1.1
    assert 15.9 < A.max() <= 16
    assert 0.00099 < dt.min() < 0.0011
    assert 0.09 < dt.max() < 0.101
    assert 0.0085 < dt.median() < 0.0115
    assert torch.equal(module.D, torch.ones(4096))


def test_every_parameter_learns() -> None:
    module = mixer(2, torch.float32)
    module(torch.randn(2, 9, HIDDEN)).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-4, name
