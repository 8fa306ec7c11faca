"""From a teacher to a student: everything copied bit for bit, and new mixers that start near the attention they replace
(arXiv 2408.15237, sec. 3; how, each says in its `start`). From an aligned student to others: its mixers, layer by
layer.

Shapes: B batch, L length, D hidden, H heads, P head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from thinkfast.errors import BadInput
from thinkfast.model.attention import Attention
from thinkfast.model.config import MAMBA
from thinkfast.model.decoder import Block, Decoder
from thinkfast.model.mixer import StateMixer, keep_input
from thinkfast.student.plan import LayerPlan


def convert(teacher: Decoder, plan: LayerPlan, calibration: Tensor | None = None, seed: int = 0) -> Decoder:
    """A student of `teacher` with the layers of `plan`, in eval mode; the teacher is not changed.

    `calibration` (B, L) holds token ids without padding: the gate and the norm of the new mixers are fitted to what the
    teacher computes on them. Without it the gate starts small and random. `seed` fixes every random number. Raises
    BadInput as `LayerPlan.student_config`, and when the calibration ids are outside the vocabulary.
    """
    config = plan.student_config(teacher.config)
    parameter = teacher.embed_tokens.weight
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        student = Decoder(config).to(parameter.device, parameter.dtype)
        replaced = [index for index, kind in enumerate(config.layer_types) if kind == MAMBA]
        fresh = tuple(f"layers.{index}.mixer." for index in replaced)
        state = {name: value for name, value in student.state_dict().items() if name.startswith(fresh)}
        state |= {name: value for name, value in teacher.state_dict().items() if not name.startswith(fresh)}
        student.load_state_dict(state)
        if plan.init == "attention":
            traces = repeat(None) if calibration is None else attention_traces(teacher, calibration)
            for new, old, trace in zip(blocks(student), blocks(teacher), traces, strict=False):
                if isinstance(new.mixer, StateMixer) and isinstance(old.mixer, Attention):
                    new.mixer.start(old.mixer, old.input_layernorm.weight, trace)
    return student.eval()


@torch.no_grad()
def attention_traces(teacher: Decoder, input_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Layer by layer, the normed input of the attention (B, L, D) and its output before o_proj (B, L, H * P)."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise BadInput(f"calibration ids have shape {tuple(input_ids.shape)}, expected (rows, length)")
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= teacher.config.vocab_size:
        raise BadInput(f"calibration ids are not all in 0..{teacher.config.vocab_size - 1}, the teacher's vocabulary")
    x = teacher.embed_tokens(input_ids)
    for block in blocks(teacher):
        u = block.input_layernorm(x)
        seen: list[Tensor] = []
        with _output_projection(block).register_forward_pre_hook(partial(keep_input, seen)):
            x = x + block.mix(u)
        x = x + block.mlp(block.post_attention_layernorm(x))
        yield u, seen[0]


def blocks(model: Decoder) -> list[Block]:
    """The layers of a decoder."""
    return [layer for layer in model.layers if isinstance(layer, Block)]


def _output_projection(block: Block) -> nn.Linear:
    return block.mixer.o_proj if isinstance(block.mixer, Attention) else block.mixer.out_proj
