"""What a training run takes before it starts: memory on every GPU, floating point operations, hours.

Counts follow the trainer: float32 weights, gradients and two moments in shards, the teacher in shards, weights gathered
unit by unit, activations of one batch. FLOPs are those of matrix products and recurrences; two a multiply-add.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import without_initialisation
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Block

GIB = 2**30
SINGLE, HALF = 4, 2
RESERVE = 1.5 * GIB
"""The context of the GPU's driver and libraries, and what the allocator cannot join."""
SHARE = 0.3
"""The share of a card's peak that a plan counts on: an assumption, told with every plan."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: its memory in bytes and its dense bfloat16 peak in FLOP a second, as its maker states them."""

    name: str
    memory: float
    peak: float


CARDS = {
    card.name.lower(): card
    for card in (
        Card("RTX3090", 24 * GIB, 71e12),
        Card("RTX4090", 24 * GIB, 165e12),
        Card("L40S", 48 * GIB, 362e12),
        Card("A100-40", 40 * GIB, 312e12),
        Card("A100", 80 * GIB, 312e12),
        Card("H100", 80 * GIB, 989e12),
        Card("H200", 141e9, 989e12),
        Card("B200", 180e9, 2250e12),
    )
}


@dataclass(frozen=True, slots=True)
class Phase:
    """A stage of training. `batch_tokens` are those of one batch of one process; `layerwise`: mixers alone are trained,
    each on its teacher layer's input; `taught`: the teacher runs along."""

    name: str
    tokens: float
    batch_tokens: int
    row_tokens: int
    layerwise: bool = False
    taught: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """How a run computes: the number of processes, in bfloat16 or not, with activations computed again or kept."""

    processes: int
    half: bool
    recompute: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """What a phase takes: bytes on every GPU by purpose, FLOPs in all, hours on the GPUs."""

    phase: Phase
    memory: dict[str, float]
    flops: float
    hours: float

    @property
    def bytes(self) -> float:
        """Bytes on every GPU."""
        return sum(self.memory.values())

    def of_all(self, processes: int) -> Cost:
        """The same with the memory of all processes on one machine."""
        return replace(self, memory={name: processes * value for name, value in self.memory.items()})


def parse_gpus(text: str) -> tuple[int, Card]:
    """ "8xH100" as a number and a card. Raises BadInput naming the cards that are known."""
    match = re.fullmatch(r"(?:(\d+)x)?(\S+)", text.strip())
    if match is None or match[2].lower() not in CARDS or match[1] == "0":
        raise BadInput(f"--plan {text}: expected a number and a card, e.g. 8xH100; known are {', '.join(CARDS)}")
    return int(match[1] or 1), CARDS[match[2].lower()]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of a decoder: all of them, outside of the layers, of the largest unit, of all mixers with a state."""

    whole: int
    root: int
    unit: int
    recurrent: int


def sizes(config: DecoderConfig) -> Sizes:
    """Counts the parameters of `config` on one block of every kind, without allocating them."""
    root = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    whole, recurrent, unit = root, 0, 0
    for kind in set(config.layer_types):
        with without_initialisation():
            block = Block(config, kind)
        count = config.layer_types.count(kind)
        mixer, mlp = (sum(p.numel() for p in part.parameters()) for part in (block.mixer, block.mlp))
        whole += count * (mixer + mlp + 2 * config.hidden_size)
        recurrent += count * mixer if kind != ATTENTION else 0
        unit = max(unit, mixer, mlp)
    return Sizes(whole, root, unit, recurrent)


def forward_flops(config: DecoderConfig, row_tokens: int) -> float:
    """FLOPs a token of a forward pass over rows of `row_tokens`: products with weights, the head, attention over half a
    row on average, the chunked scan (see `thinkfast.ops.ssd.ssd_chunked`)."""
    counted = sizes(config)
    total = 2.0 * (counted.whole - counted.root + config.vocab_size * config.hidden_size)
    attention = 2 * row_tokens * config.num_heads * config.head_dim
    mamba, recurrent = config.mamba, 0
    if mamba is not None:
        chunk = min(mamba.chunk_size, row_tokens)
        recurrent = 2 * mamba.n_heads * (chunk * (mamba.d_state + mamba.head_dim) + 2 * mamba.d_state * mamba.head_dim)
    return total + sum(attention if kind == ATTENTION else recurrent for kind in config.layer_types)


def flops(teacher: DecoderConfig, student: DecoderConfig, phase: Phase, recompute: bool) -> float:
    """FLOPs of a phase: the teacher's forward pass, the student's forward and backward (twice that), and its second
    forward where activations are recomputed. A layer-wise phase runs the student's mixers alone."""
    taught = forward_flops(teacher, phase.row_tokens) if phase.taught else 0.0
    if phase.layerwise:
        learnt = 6.0 * sizes(student).recurrent
    else:
        learnt = forward_flops(student, phase.row_tokens) * (4 if recompute else 3)
    return phase.tokens * (taught + learnt)


def layer_bytes(config: DecoderConfig, kind: str, width: int) -> float:
    """Bytes a token that one layer keeps for its backward pass, numbers of `width` bytes where it computes in them.

    Norms keep a float32 copy of their input; a Mamba-2 mixer its convolved channels and its scan in float32, of which
    the decay and score matrices of a chunk are the largest part.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    kept: float = 2 * hidden * (width + 2 * SINGLE) + width * (hidden + 4 * inner)
    mamba = config.mamba
    if kind == ATTENTION or mamba is None:
        return kept + width * (4 * config.num_heads + 4 * config.num_kv_heads) * config.head_dim
    matrices = 2 * mamba.n_heads * mamba.chunk_size + mamba.n_heads * mamba.head_dim * mamba.d_state / mamba.chunk_size
    scan = SINGLE * (6 * mamba.d_inner + 3 * mamba.conv_dim + matrices)
    return kept + width * (mamba.in_proj_rows + 2 * mamba.conv_dim + 2 * mamba.d_inner) + scan


def memory(teacher: DecoderConfig, student: DecoderConfig, phase: Phase, setting: Setting) -> dict[str, float]:
    """Bytes on every GPU by purpose, the largest at any moment of a step."""
    mine, theirs = sizes(student), sizes(teacher)
    width, processes = HALF if setting.half else SINGLE, setting.processes
    trained = mine.recurrent if phase.layerwise else mine.whole
    layers = [layer_bytes(student, kind, width) for kind in student.layer_types]
    if phase.layerwise:
        kept = sum(bytes_ for bytes_, kind in zip(layers, student.layer_types, strict=True) if kind != ATTENTION)
    elif setting.recompute:
        kept = max(layers) + len(layers) * student.hidden_size * width
    else:
        kept = sum(layers)
    loss = 0.0 if phase.layerwise else SINGLE * (student.vocab_size * student.hidden_size + 8 * (1 << 22))
    gathered = width * (theirs.root + mine.root + 2 * mine.unit) + (0 if phase.layerwise else SINGLE * mine.root)
    return {
        "student": SINGLE * (mine.whole + trained) / processes,
        "optimizer": 2 * SINGLE * trained / processes,
        "teacher": width * theirs.whole / processes if phase.taught else 0.0,
        "gathered": gathered + SINGLE * mine.unit,
        "activations": kept * phase.batch_tokens,
        "loss": loss + phase.batch_tokens * student.hidden_size * (2 * width + SINGLE),
        "reserve": RESERVE,
    }


def cost(
    teacher: DecoderConfig,
    student: DecoderConfig,
    phase: Phase,
    setting: Setting,
    card: Card,
) -> Cost:
    """What a phase takes on cards that reach `SHARE` of their peak."""
    work = flops(teacher, student, phase, setting.recompute)
    hours = work / (setting.processes * card.peak * SHARE) / 3600
    return Cost(phase, memory(teacher, student, phase, setting), work, hours)


def check_memory(cost: Cost, available: float, where: str) -> None:
    """Raises BadInput when a phase needs more than is there, naming what takes most and what to change."""
    if cost.bytes <= available:
        return
    most = max(cost.memory, key=lambda name: cost.memory[name])
    remedy = "a smaller batch_tokens (with accumulate)" if most in ("activations", "loss") else "more GPUs"
    raise BadInput(
        f"{cost.phase.name}.batch_tokens {cost.phase.batch_tokens}: needs {cost.bytes / GIB:.1f} GiB on {where}, which "
        f"has {available / GIB:.1f}; {cost.memory[most] / GIB:.1f} GiB are {most}: take {remedy}"
    )


def cost_document(cost: Cost) -> dict[str, Any]:
    """A phase's cost as it is written and printed."""
    return {
        "stage": cost.phase.name,
        "tokens": int(cost.phase.tokens),
        "gib_per_gpu": round(cost.bytes / GIB, 2),
        "memory_gib": {name: round(value / GIB, 2) for name, value in cost.memory.items()},
        "flops": cost.flops,
        "hours": round(cost.hours, 3),
    }


def peak_here(device: str) -> float | None:
    """The peak of what a process computes on, in FLOP a second: of a GPU as its maker states it, None for one that is
    not known; of a CPU the best of a few large float32 products on its threads."""
    if device == "cpu":
        return max(_product_rate(1024) for _ in range(5))
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((card.peak for key, card in CARDS.items() if key.split("-")[0] in name), None)


def _product_rate(size: int) -> float:
    a, b = torch.ones(size, size), torch.ones(size, size)
    start = time.perf_counter()
    torch.mm(a, b)
    return 2.0 * size**3 / (time.perf_counter() - start)
