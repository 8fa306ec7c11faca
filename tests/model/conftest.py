"""Small decoders with every parameter random, so that a mix-up of any two shows in the logits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig, RopeScaling
from thinkfast.model.decoder import Decoder

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LLAMA = DecoderConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=44,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layer_types=(ATTENTION,) * 3,
    rms_norm_eps=3e-5,
    rope_theta=300.0,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=0,
)
HYBRID = replace(
    LLAMA,
    layer_types=(MAMBA, ATTENTION, MAMBA),
    mamba=MambaConfig(n_heads=4, head_dim=16, d_state=6, n_groups=2, chunk_size=8),
)
PURE = replace(HYBRID, layer_types=(MAMBA, MAMBA))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Matrices keep the scale of their activations; everything else is drawn away from its usual 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.5
            centre = 0.0 if parameter.dim() > 1 else 0.3
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def random_decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    randomise(model, seed)
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    llama3 = replace(LLAMA, rope_scaling=SCALING)
    configs = {"llama": LLAMA, "llama3": llama3, "hybrid": HYBRID, "pure": PURE}
    return SimpleNamespace(configs=configs, random_decoder=random_decoder, randomise=randomise)
