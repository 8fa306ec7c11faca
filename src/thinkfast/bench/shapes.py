"""Models with the exact shapes of published ones and random weights: speed can be measured without a download."""

from __future__ import annotations

import difflib

import torch

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig, RopeScaling
from thinkfast.model.decoder import Decoder
from thinkfast.student.plan import LayerPlan, every

PREFIX = "random:"
_LLAMA3 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def _shape(
    vocab: int, hidden: int, inter: int, heads: int, kv: int, dim: int, layers: int, theta: float, limit: int
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=dim,
        layer_types=(ATTENTION,) * layers,
        rope_theta=theta,
        rope_scaling=_LLAMA3 if vocab == 128256 else None,
        max_position_embeddings=limit,
    )


TEACHERS = {
    "smollm2-135m": _shape(49152, 576, 1536, 9, 3, 64, 30, 1e5, 8192),
    "llama-3.2-1b": _shape(128256, 2048, 8192, 32, 8, 64, 16, 5e5, 131072),
    "llama-3.2-3b": _shape(128256, 3072, 8192, 24, 8, 128, 28, 5e5, 131072),
}
STUDENTS = {"": None, "-hybrid": 4, "-pure": 0}  # one attention layer in four; none
NAMES = tuple(PREFIX + teacher + student for teacher in TEACHERS for student in STUDENTS)


def random_config(name: str) -> DecoderConfig:
    """The shape that `random:smollm2-135m`, `random:smollm2-135m-hybrid`, `random:smollm2-135m-pure` and so on name.

    Students are those that `convert` makes, hybrids with one attention layer in four. Raises BadInput for other names.
    """
    for teacher, config in TEACHERS.items():
        for student, stride in STUDENTS.items():
            if name == PREFIX + teacher + student:
                kept = every(config.num_layers, stride) if stride else ()
                return config if stride is None else LayerPlan(attention=kept).student_config(config)
    near = difflib.get_close_matches(name, NAMES, 1)
    told = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(NAMES)}"
    raise BadInput(f"{name}: no such shape, {told}")


def random_model(name: str) -> Decoder:
    """A model of that shape, its numbers as a bfloat16 checkpoint would hold them. Raises BadInput as above."""
    config = random_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(config).to(torch.bfloat16)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.normal_(0.0, 0.02)
    return model.eval()
