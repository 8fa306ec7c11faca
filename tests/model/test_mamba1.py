"""Mamba-1 against its definition, and the pairing of its heads with those of attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from thinkfast.errors import BadInput
from thinkfast.model.cache import empty_mamba_cache
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig
from thinkfast.model.mamba1 import Mamba1

SHAPE = MambaConfig(n_heads=4, head_dim=8, d_state=4, n_groups=2, kind="mamba1")
CONFIG = DecoderConfig(53, 24, 44, 4, 2, 8, (MAMBA,), SHAPE)


def random_mixer(tiny) -> Mamba1:
    mixer = Mamba1(CONFIG)
    tiny.randomise(mixer)
    return mixer


def definition(mixer: Mamba1, u: torch.Tensor) -> torch.Tensor:
    """Channel by channel, position by position, in float64: channel c of query head h reads slice s = c // N of
    key/value head h // 2, keys and queries as values do."""
    w = {name: tensor.double() for name, tensor in mixer.state_dict().items()}
    u = u.double()
    narrow_x, narrow_b = u @ w["in_proj_x.weight"].T, u @ w["B_proj.weight"].T
    q, z = u @ w["C_proj.weight"].T, u @ w["in_proj_z.weight"].T
    dt = F.softplus(u @ w["dt_proj_down.weight"].T @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    outputs = []
    for head in range(4):
        for c in range(8):
            channel, read = head * 8 + c, (head // 2) * 8
            raw = torch.cat((torch.zeros(3, dtype=torch.float64), narrow_x[:, read + c]))
            taps = w["conv1d.weight"][channel, 0]
            x = F.silu(torch.stack([(raw[t : t + 4] * taps).sum() for t in range(len(u))]) + w["conv1d.bias"][channel])
            start = c // 4 * 4
            keys, queries = narrow_b[:, read + start : read + start + 4], q[:, head * 8 + start : head * 8 + start + 4]
            h, A, y = torch.zeros(4, dtype=torch.float64), -torch.exp(w["A_log"][channel]), []
            for t in range(len(u)):
                h = torch.exp(dt[t, channel] * A) * h + dt[t, channel] * x[t] * keys[t]
                y.append((h * queries[t]).sum() + w["D"][channel] * x[t])
            outputs.append(torch.stack(y) * F.silu(z[:, channel]))
    return torch.stack(outputs, -1) @ w["out_proj.weight"].T


@torch.no_grad()
def test_equals_the_definition(tiny) -> None:
    mixer = random_mixer(tiny)
    u = torch.randn(1, 11, 24, generator=torch.Generator().manual_seed(1))
    want = definition(mixer, u[0])
    assert (mixer(u)[0] - want).abs().max() < 2e-5 * want.abs().max()


@torch.no_grad()
def test_cached_parts_equal_the_full_forward(tiny) -> None:
    mixer = random_mixer(tiny)
    u = torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(2))
    cache = empty_mamba_cache(SHAPE, 2, "cpu")
    parts = [mixer(part, cache) for part in u.split([9, 1, 1, 7, 1], dim=1)]
    whole = mixer(u)
    assert (torch.cat(parts, 1) - whole).abs().max() < 2e-5 * whole.abs().max()


def test_every_parameter_learns(tiny) -> None:
    mixer = random_mixer(tiny)
    mixer(torch.randn(2, 13, 24)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in mixer.parameters())


def test_it_has_no_matrix_a_head(tiny) -> None:
    with pytest.raises(BadInput, match="Mamba-1 has no mixer matrix a head"):
        random_mixer(tiny).matrix(torch.randn(1, 3, 24))


def test_a_head_that_cannot_be_cut_is_refused() -> None:
    teacher = DecoderConfig(53, 24, 44, 1, 1, 24, (ATTENTION,))
    with pytest.raises(BadInput, match="head_dim 24 is no multiple of Mamba-1's state of 16"):
        Mamba1.shape_of(teacher, None)
    with pytest.raises(BadInput, match="n_groups is 3, but Mamba-1 has one for each of 1 kv heads"):
        Mamba1.shape_of(teacher, 3)
