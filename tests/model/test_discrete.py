"""Discrete Mamba-2 against its definition, and whole models in the layout of Llamba."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from thinkfast.engine import Engine, SamplingParams
from thinkfast.errors import BadInput
from thinkfast.model.cache import empty_mamba_cache
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.config import MambaConfig
from thinkfast.model.discrete import DiscreteMamba2

SHAPE = MambaConfig(n_heads=4, head_dim=8, d_state=6, n_groups=2, chunk_size=8, kind="discrete")
RAW = {
    "model_type": "llamba",
    "vocab_size": 51,
    "pad_vocab_size_multiple": 8,
    "d_model": 32,
    "n_layer": 2,
    "norm_epsilon": 1e-5,
    "tie_embeddings": False,
    "lm_head_bias": False,
    "mlp_cfg": {"intermediate_size": 44, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {"d_state": 6, "n_v_heads": 4, "n_qk_heads": 2, "expand": 1, "chunk_size": 8, "activation": "identity"},
}


def definition(state: dict[str, torch.Tensor], u: torch.Tensor) -> torch.Tensor:
    """One position after another, in float64, from the paper: h = exp(-softplus(a)) h + B x, y = C h + D x, gated."""
    w = {name: tensor.double() for name, tensor in state.items()}
    heads, width, size, groups = SHAPE.n_heads, SHAPE.head_dim, SHAPE.d_state, SHAPE.n_groups
    xbc, z, a = torch.split(u.double() @ w["in_proj.weight"].T, [SHAPE.conv_dim, SHAPE.d_inner, heads], -1)
    padded = torch.cat((xbc.new_zeros(3, xbc.shape[1]), xbc))
    taps = w["conv1d.weight"][:, 0]
    mixed = torch.stack([(padded[t : t + 4].T * taps).sum(1) for t in range(len(xbc))]) + w["conv1d.bias"]
    h = torch.zeros(heads, width, size, dtype=torch.float64)
    outputs = []
    for row, gate, decay in zip(mixed, z, a, strict=True):
        x = row[: SHAPE.d_inner].view(heads, width)
        B, C = row[SHAPE.d_inner :].view(2, groups, size).repeat_interleave(heads // groups, 1)
        h = torch.exp(-F.softplus(decay))[:, None, None] * h + x[:, :, None] * B[:, None]
        y = (h * C[:, None]).sum(-1) + w["D"][:, None] * x
        outputs.append(w["out_proj.weight"] @ (y.flatten() * F.silu(gate + w["z_bias"])))
    return torch.stack(outputs)


def random_mixer(tiny) -> DiscreteMamba2:
    mixer = DiscreteMamba2(replace(tiny.configs["pure"], mamba=SHAPE))
    tiny.randomise(mixer)
    return mixer.eval()


@torch.no_grad()
def test_equals_the_definition(tiny) -> None:
    mixer = random_mixer(tiny)
    u = torch.randn(1, 21, 32, generator=torch.Generator().manual_seed(1))
    u[0, 3] *= 30  # decays near 0 and near 1
    want = definition(mixer.state_dict(), u[0])
    assert (mixer(u)[0] - want).abs().max() < 2e-5 * want.abs().max()


@torch.no_grad()
def test_cached_parts_equal_the_full_forward(tiny) -> None:
    mixer = random_mixer(tiny)
    u = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(2))
    cache = empty_mamba_cache(SHAPE, 2, "cpu")
    parts = [mixer(part, cache) for part in u.split([9, 1, 1, 7, 1], dim=1)]
    assert (torch.cat(parts, 1) - mixer(u)).abs().max() < 2e-5


def test_every_parameter_learns(tiny) -> None:
    mixer = random_mixer(tiny)
    mixer(torch.randn(2, 13, 32)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in mixer.parameters())


def llamba(path: Path, raw: dict) -> dict[str, torch.Tensor]:
    """A random checkpoint with the names of the published ones."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)

    state = {"backbone.embedding.weight": draw(56, 32), "backbone.final_layernorm.weight": 1 + draw(32)}
    state["lm_head.weight"] = draw(56, 32)
    for index in range(raw["n_layer"]):
        prefix = f"backbone.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}.{name}.weight"] = 1 + draw(32)
        for name, shape in {"gate_proj": (44, 32), "up_proj": (44, 32), "down_proj": (32, 44)}.items():
            state[f"{prefix}.mlp.{name}.weight"] = draw(*shape)
        mixer = {"in_proj.weight": draw(SHAPE.in_proj_rows, 32), "z_bias": draw(32), "D": draw(4)}
        mixer |= {"conv1d.weight": draw(SHAPE.conv_dim, 1, 4), "conv1d.bias": draw(SHAPE.conv_dim)}
        mixer["out_proj.weight"] = draw(32, 32)
        state |= {f"{prefix}.mixer.{name}": tensor for name, tensor in mixer.items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    torch.save(state, path / "pytorch_model.bin")
    return state


@torch.no_grad()
def test_a_checkpoint_of_llamba_loads_and_generates(tmp_path: Path) -> None:
    state = llamba(tmp_path / "llamba", RAW)
    model = load_model(tmp_path / "llamba")
    ids = torch.tensor([3, 50, 7, 12, 9, 9, 1, 30, 2, 41, 5])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * state[f"backbone.{name}.weight"].double()

    x = state["backbone.embedding.weight"][ids].double()
    for index in range(2):
        layer = f"layers.{index}"
        part = {name.removeprefix(f"backbone.{layer}."): tensor for name, tensor in state.items()}
        mixer = {name.removeprefix("mixer."): t for name, t in part.items() if name.startswith("mixer.")}
        x = x + definition(mixer, norm(x, f"{layer}.input_layernorm"))
        u = norm(x, f"{layer}.post_attention_layernorm")
        gate, up, down = (part[f"mlp.{name}_proj.weight"].double() for name in ("gate", "up", "down"))
        x = x + (F.silu(u @ gate.T) * (u @ up.T)) @ down.T
    want = norm(x, "final_layernorm") @ state["lm_head.weight"].double().T
    assert (model(ids[None])[0] - want).abs().max() < 1e-5

    engine = Engine(model, slots=2)
    assert engine.backend == "torch"
    drawn = engine.sample([ids.tolist()], 1, SamplingParams(max_tokens=8, temperature=0))[0][0].token_ids
    assert len(drawn) == 8
    whole = torch.tensor([[*ids.tolist(), *drawn]])
    assert model(whole)[0, len(ids) - 1 : -1].argmax(-1).tolist() == list(drawn)
    with pytest.raises(BadInput, match="kernels have no Discrete Mamba-2"):
        Engine(model, slots=2, backend="native")


def test_what_no_stock_layout_expresses_is_not_written(tmp_path: Path) -> None:
    llamba(tmp_path / "llamba", RAW)
    with pytest.raises(BadInput, match="Discrete Mamba-2, which no stock layout can express: distil"):
        save_model(load_model(tmp_path / "llamba"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("ssm_cfg", "activation", "silu"), ("ssm_cfg", "bias", True), ("mlp_cfg", "act_fn", "relu")],
)
def test_other_variants_are_refused(tmp_path: Path, section: str, field: str, value: object) -> None:
    llamba(tmp_path / "llamba", {**RAW, section: {**RAW[section], field: value}})
    with pytest.raises(BadInput, match=rf"config\.json: {section}: {field} is {value!r}"):
        load_model(tmp_path / "llamba")
