"""What every mixer with a state has in common: its matrix, its start from attention, its bookkeeping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from thinkfast.errors import BadInput
from thinkfast.model.cache import empty_mamba_cache
from thinkfast.model.checkpoint import load_model, save_model, save_own
from thinkfast.model.config import ATTENTION, MAMBA
from thinkfast.model.mixer import CONV_GAIN, DT, GATE_ONE, half_lives
from thinkfast.model.mixers import MIXERS
from thinkfast.student.convert import attention_traces, convert
from thinkfast.student.plan import LayerPlan

KINDS = list(MIXERS)
IDS = torch.arange(40).view(2, 20) % 53


@pytest.fixture
def teacher(tiny):
    return tiny.random_decoder(tiny.configs["llama"])


def linear_attention(q, k, v, decay, slices=1):
    """y_t = sum over s <= t of decay^(t - s) (q_t . k_s) v_s, head by head, a loop over pairs; q, k, v (L, H, P).

    With `slices` a head is cut into that many, each of which sees its own part of q and k alone.
    """
    length, heads, width = q.shape
    out, size = torch.zeros_like(v), width // slices
    for h in range(heads):
        for part in range(slices):
            at = slice(part * size, (part + 1) * size)
            for t in range(length):
                for s in range(t + 1):
                    out[t, h, at] += decay[h] ** (t - s) * (q[t, h, at] @ k[s, h, at]) * v[s, h, at]
    return out


def heads_of(attention, u):
    """Queries, keys and values (L, H, P), in float64, keys and values as the attention pairs them, without rotation."""
    u, width = u.double(), attention.head_dim
    q, k, v = (u @ p.weight.double().T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    repeats = attention.num_heads // attention.num_kv_heads
    k, v = (x.view(len(u), -1, width).repeat_interleave(repeats, 1) for x in (k, v))
    return q.view(len(u), -1, width) * width**-0.5, k, v


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_it_is_linear_attention_with_the_heads_of_attention(tiny, kind):
    """The pairing of heads in particular: keys that meet another head's queries are far off."""
    teacher = tiny.random_decoder(replace(tiny.configs["llama"], head_dim=32))
    mixer, attention = convert(teacher, LayerPlan(mixer=kind)).layers[0].mixer, teacher.layers[0].mixer
    seen = []
    mixer.out_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0][0].double()))
    # The gate and the norm behind the recurrence are no part of the formula; SiLUs are nearly linear for small inputs.
    u = 1e-2 * torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(4))
    decay, slices, factor = 0.5 ** (1 / half_lives(4).double()), 1, 1.0
    if kind == "mamba2":
        mixer.norm.forward = lambda y, z: y
        factor = DT * (CONV_GAIN / 2) ** 3
    elif kind == "discrete":
        decay = torch.full((4,), 0.5, dtype=torch.float64)
    else:
        mixer.in_proj_z.forward = lambda u: torch.full((*u.shape[:2], 128), GATE_ONE)
        slices = 2
    mixer(u)
    wanted = factor * linear_attention(*heads_of(attention, u[0]), decay, slices).flatten(1)
    assert (seen[0] - wanted).norm() < 2e-2 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba2", "discrete"])
def test_the_matrix_is_what_the_recurrence_multiplies_its_values_by(tiny, kind):
    config = replace(tiny.configs["hybrid"], mamba=replace(tiny.configs["hybrid"].mamba, kind=kind))
    mixer = tiny.random_decoder(config).layers[0].mixer
    u = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1))
    matrix = mixer.matrix(u)
    assert matrix.shape == (2, 4, 13, 13)
    assert not matrix.triu(1).any()
    values = mixer._inputs(mixer.in_proj(u), None)[1]
    gated = torch.einsum("bhts,bshp->bthp", matrix, values)
    if kind == "mamba2":
        wanted = mixer.out_proj(mixer.norm(gated.flatten(2), mixer._inputs(mixer.in_proj(u), None)[0]))
    else:
        z = mixer._inputs(mixer.in_proj(u), None)[0]
        wanted = mixer.out_proj(gated.flatten(2) * F.silu(z + mixer.z_bias))
    assert torch.allclose(mixer(u), wanted, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrated_start_is_nearer_than_an_uncalibrated_and_a_random_one(teacher, kind):
    def error(student):
        pairs = zip(student.layers, attention_traces(teacher, IDS + 3), strict=True)
        return sum(
            float((block.mixer(u) - teacher.layers[index].mixer(u)).pow(2).sum())
            for index, (block, (u, _)) in enumerate(pairs)
        )

    fitted = error(convert(teacher, LayerPlan(mixer=kind), IDS))
    assert fitted < error(convert(teacher, LayerPlan(mixer=kind)))
    assert fitted < error(convert(teacher, LayerPlan(mixer=kind, init="random")))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_states_go_on_after_a_prefill(teacher, kind):
    """What a prefill leaves behind is what single steps leave behind."""
    mixer = convert(teacher, LayerPlan(mixer=kind), IDS).layers[1].mixer
    u = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    caches = [empty_mamba_cache(mixer.shape, 2, "cpu") for _ in range(2)]
    mixer(u, caches[0])
    for t in range(9):
        mixer(u[:, t : t + 1], caches[1])
    for one, other in ((caches[0].state, caches[1].state), (caches[0].conv, caches[1].conv)):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_decays_stay_finite_in_bfloat16(teacher, kind):
    mixer = convert(teacher, LayerPlan(mixer=kind), IDS).layers[0].mixer.to(torch.bfloat16)
    for scale in (1.0, 300.0):
        u = (scale * torch.randn(1, 30, 32)).to(torch.bfloat16)
        out = mixer(u)
        out.float().pow(2).sum().backward()
        assert out.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", [(), (1,)])
def test_a_student_comes_back_from_disk(teacher, tmp_path, kind, attention):
    student = convert(teacher, LayerPlan(attention, mixer=kind), IDS)
    save_own(student, tmp_path / "student")
    loaded = load_model(tmp_path / "student")
    assert loaded.config.layer_types == tuple(ATTENTION if i in attention else MAMBA for i in range(3))
    with torch.no_grad():
        assert torch.equal(loaded(IDS), student(IDS))


def test_only_mamba2_is_written_as_a_stock_model(teacher, tmp_path):
    for kind, name in (("discrete", "Discrete Mamba-2"), ("mamba1", "Mamba-1")):
        with pytest.raises(BadInput, match=f"the layers are {name}, which no stock layout can express"):
            save_model(convert(teacher, LayerPlan(mixer=kind)), tmp_path / "out")
    save_model(convert(teacher, LayerPlan()), tmp_path / "stock")
