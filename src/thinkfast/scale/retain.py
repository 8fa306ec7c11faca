"""What a student kept of its teacher, measured on texts: loops, repetition, divergence, agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinkfast.model.decoder import Decoder

SPAN = 16
LOOP_COPIES = 3
LOOP_TOKENS = 30


def repetition(ids: Sequence[int], span: int = SPAN) -> float:
    """Share of the windows of `span` tokens that stood earlier in the same text, 0..1; 0 for a shorter text."""
    windows = [tuple(ids[at : at + span]) for at in range(len(ids) - span + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


def loops(ids: Sequence[int]) -> bool:
    """Whether a text ends in one sequence said over and over: three times or more, over at least 30 tokens."""
    for unit in range(1, len(ids) // LOOP_COPIES + 1):
        span = max(LOOP_COPIES * unit, LOOP_TOKENS)
        if span <= len(ids) and all(ids[-k] == ids[-k - unit] for k in range(1, span - unit + 1)):
            return True
    return False


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sums over the answer tokens of one text: KL(teacher || student) in nats, and equal first choices."""

    tokens: int
    kl: float
    agreed: int


def divergence(
    teacher: Decoder, student: Decoder, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Divergence]:
    """How far two models of one vocabulary differ where they read the same texts, one after the other, at T = 1."""
    import torch
    import torch.nn.functional as F

    found = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=teacher.head_weight.device)
            # The last token of the prompt predicts the first of the answer; the last of the answer predicts nothing.
            rows = slice(len(prompt) - 1, -1)
            taught = F.log_softmax(teacher(ids)[0, rows].float(), -1)
            learned = F.log_softmax(student(ids)[0, rows].float(), -1)
            kl = (taught.exp() * (taught - learned)).sum()
            agreed = (taught.argmax(-1) == learned.argmax(-1)).sum()
            found.append(Divergence(len(answer), float(kl), int(agreed)))
    return found
