from collections.abc import Callable

import pytest
import torch

from thinkfast.model.config import DecoderConfig, MambaConfig, RopeScaling
from thinkfast.model.decoder import Decoder

A, M = "attention", "mamba"
BASE = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=44,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layer_types=(A, A),
    max_position_embeddings=256,
    eos_token_ids=(3,),
)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CHANGES: dict[str, dict[str, object]] = {
    "attention": {},
    "pure": {"layer_types": (M, M), "mamba": MambaConfig(4, 8, 16, 4)},
    "hybrid": {"layer_types": (M, A, M), "mamba": MambaConfig(4, 16, 8, 2)},
    "odd": {
        "vocab_size": 37,
        "hidden_size": 27,
        "intermediate_size": 19,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 24,
        "layer_types": (A, M),
        "mamba": MambaConfig(6, 5, 7, 3, d_conv=3),
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA3,
    },
    "one_group": {"layer_types": (M,), "mamba": MambaConfig(3, 44, 5, 1, d_conv=1)},
    "wide_sharing": {"num_heads": 7, "num_kv_heads": 1, "head_dim": 36, "rope_scaling": LLAMA3},
    "no_sharing": {"num_heads": 3, "num_kv_heads": 3, "head_dim": 68, "eos_token_ids": (3, 4)},
}


def build(name: str, seed: int = 0, **changes: object) -> Decoder:
    """A random decoder with lively logits: entropies well inside (0, log vocab)."""
    fields = {field: getattr(BASE, field) for field in BASE.__slots__}
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig(**{**fields, **CHANGES[name], **changes})).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.startswith(("embed_tokens", "lm_head")):
                value.normal_(0.0, 0.25)
            elif "norm" in key or key.endswith((".D", "dt_bias")):
                value.add_(0.3 * torch.randn_like(value))
            elif "proj" in key:
                value.mul_(2.0)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Decoder]:
    return build


@pytest.fixture(params=sorted(CHANGES))
def any_model(request: pytest.FixtureRequest) -> Decoder:
    return build(request.param)
