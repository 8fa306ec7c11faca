"""Llamba's layout against its public implementation, which runs in an environment of its own (`make llamba`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from thinkfast.engine import Engine, SamplingParams
from thinkfast.model.checkpoint import load_model

PYTHON = os.environ.get("THINKFAST_LLAMBA", "")
PROGRAM = Path(__file__).with_name("llamba_mlx.py")
VOCABULARY, HIDDEN, WIDE, HEADS, STATE = 56, 32, 48, 4, 6
PROMPT = [3, 50, 7, 12, 9, 9, 1, 30, 2, 41, 5]
RAW = {
    "model_type": "llamba",
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "n_layer": 3,
    "tie_embeddings": False,
    "lm_head_bias": False,
    "mlp_cfg": {"intermediate_size": WIDE, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {"d_state": STATE, "n_v_heads": HEADS, "n_qk_heads": HEADS, "expand": 1, "activation": "identity"},
}


def checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Random weights under the names of the published files."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (2 * shape[-1] ** -0.5 if len(shape) > 1 else 0.5)

    channels = HIDDEN + 2 * HEADS * STATE
    state = {"backbone.embedding.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    state["backbone.final_layernorm.weight"] = 1 + draw(HIDDEN)
    for index in range(RAW["n_layer"]):
        state |= {
            f"backbone.layers.{index}.{name}": tensor
            for name, tensor in {
                "input_layernorm.weight": 1 + draw(HIDDEN),
                "post_attention_layernorm.weight": 1 + draw(HIDDEN),
                "mixer.in_proj.weight": draw(channels + HIDDEN + HEADS, HIDDEN),
                "mixer.conv1d.weight": draw(channels, 1, 4),
                "mixer.conv1d.bias": draw(channels),
                "mixer.z_bias": draw(HIDDEN),
                "mixer.D": draw(HEADS),
                "mixer.out_proj.weight": draw(HIDDEN, HIDDEN),
                "mlp.gate_proj.weight": draw(WIDE, HIDDEN),
                "mlp.up_proj.weight": draw(WIDE, HIDDEN),
                "mlp.down_proj.weight": draw(HIDDEN, WIDE),
            }.items()
        }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(RAW))
    save_file(state, path / "model.safetensors")
    return state


@pytest.mark.llamba
@pytest.mark.skipif(not PYTHON, reason="no interpreter with cartesia-mlx is named: `make llamba`")
@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_cartesia(tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "model")
    model = load_model(tmp_path / "model")
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    drawn = Engine(model, slots=2).sample([PROMPT], 1, params)[0][0].token_ids
    ids = np.array([[*PROMPT, *drawn], [*reversed(PROMPT), *reversed(drawn)]])
    np.savez(tmp_path / "model.npz", ids=ids, **{name: tensor.numpy() for name, tensor in state.items()})
    done = subprocess.run(
        [PYTHON, PROGRAM, tmp_path / "model.npz", tmp_path / "logits.npy"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "logits.npy")
    ours = model(torch.from_numpy(ids)).numpy()
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert theirs[0, len(PROMPT) - 1 : -1].argmax(-1).tolist() == list(drawn)
