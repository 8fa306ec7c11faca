"""Model directories to export: random weights, every one of them away from 0 and 1, with the small vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thinkfast.data.tokenizer import load_tokenizer, save_word_tokenizer
from thinkfast.model.checkpoint import save_own
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig, RopeScaling
from thinkfast.model.decoder import Decoder

HYBRID = (MAMBA, ATTENTION, MAMBA)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
ONE = MambaConfig(n_heads=4, head_dim=16, d_state=16, n_groups=1, chunk_size=16)
CHANGES: dict[str, dict] = {
    "llama": {"layer_types": (ATTENTION,) * 2, "mamba": None},
    "qwen2": {"layer_types": (ATTENTION,) * 2, "mamba": None, "family": "qwen2", "qkv_bias": True},
    "qwen3": {"layer_types": (ATTENTION,) * 2, "mamba": None, "family": "qwen3", "qk_norm": True},
    "llama3": {"layer_types": (ATTENTION,) * 2, "mamba": None, "rope_scaling": SCALING},
    "hybrid": {},
    "hybrid-bias": {"qkv_bias": True},
    "hybrid-wide": {"mamba": replace(ONE, n_heads=8)},
    "hybrid-untied-scaled": {"tie_word_embeddings": False, "rope_scaling": SCALING},
    "hybrid-no-positions": {"rotary_dim": 0},
    "groups": {"mamba": replace(ONE, n_groups=4)},
    "groups-wide": {"mamba": replace(ONE, n_heads=8, n_groups=2)},
    "pure": {"layer_types": (MAMBA, MAMBA)},
    "pure-groups": {"layer_types": (MAMBA, MAMBA), "mamba": replace(ONE, n_groups=4)},
}


def randomise(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.5
            centre = 0.0 if parameter.dim() > 1 else 0.3
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model(name)`: a stock directory of the model called so in CHANGES; `**more` changes its shape."""
    root = tmp_path_factory.mktemp("models")
    save_word_tokenizer(root / "words")
    words = load_tokenizer(root / "words")
    base = DecoderConfig(
        vocab_size=words.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layer_types=HYBRID,
        mamba=ONE,
        rope_theta=500.0,
        max_position_embeddings=256,
        bos_token_id=words.backend.token_to_id(words.bos_token),
        eos_token_ids=(words.eos_id,),
        pad_token_id=words.pad_id,
    )

    def make(name: str, dtype: torch.dtype = torch.float32, **more: object) -> Path:
        path = root / "-".join([name, str(dtype), *(f"{key}={value}" for key, value in more.items())])
        if not path.exists():
            model = Decoder(replace(base, **{**CHANGES[name], **more}))
            randomise(model)
            save_own(model.to(dtype), path, tokenizer_from=root / "words")  # stock where a stock layout has it
        return path

    return make
