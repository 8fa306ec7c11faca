"""Distances between the teacher's and the student's next-token distributions.

Shapes: B batch, L length, N positions, V vocabulary, D hidden. Every loss is a sum over the positions of a mask divided
by `count`, the number of valid positions of the whole optimiser step, so that splitting a batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from thinkfast.errors import BadInput

FORWARD_KL = "forward_kl"
REVERSE_KL = "reverse_kl"
JSD = "jsd"
CROSS_ENTROPY = "cross_entropy"
LOSSES = (FORWARD_KL, REVERSE_KL, JSD, CROSS_ENTROPY)
CHUNK_ELEMENTS = 1 << 22


def prediction_mask(completion: Tensor) -> Tensor:
    """completion (B, L) -> mask (B, L), true at position t where token t + 1 belongs to a completion.

    The logits at t predict token t + 1: the last prompt position counts, it predicts the first completion token.
    """
    mask = torch.zeros_like(completion)
    mask[:, :-1] = completion[:, 1:]
    return mask


def next_tokens(input_ids: Tensor) -> Tensor:
    """input_ids (B, L) -> the token each position predicts (B, L); the last column is 0 and never valid."""
    return F.pad(input_ids[:, 1:], (0, 1))


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits (..., V) at softmax temperature T, times T squared (arXiv 1503.02531): (...)."""
    log_s = F.log_softmax(student.float() / temperature, -1)
    log_t = F.log_softmax(teacher.float() / temperature, -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of logits (..., V), times T squared: (...)."""
    return forward_kl(teacher, student, temperature)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence of logits (..., V), times T squared: (...).

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student, 0 < beta < 1
    (arXiv 2306.13649, eq. 1). Divided by beta it tends to the forward KL for beta -> 0.
    """
    log_s = F.log_softmax(student.float() / temperature, -1)
    log_t = F.log_softmax(teacher.float() / temperature, -1)
    weights = torch.tensor([beta, 1 - beta], device=log_s.device).log()
    log_m = torch.logaddexp(log_t + weights[0], log_s + weights[1])
    from_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    from_student = (log_s.exp() * (log_s - log_m)).sum(-1)
    return (beta * from_teacher + (1 - beta) * from_student) * temperature**2


@dataclass(frozen=True, slots=True)
class Loss:
    """Which loss, and its constants. Raises BadInput unless they name one that is defined.

    `beta` matters to the Jensen-Shannon divergence alone; `temperature` to all but cross-entropy.
    """

    kind: str = FORWARD_KL
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise BadInput(f"loss is {self.kind!r}, expected one of {', '.join(LOSSES)}")
        if not 0 < self.beta < 1:
            raise BadInput(f"beta is {self.beta}, expected a number between 0 and 1")
        if not self.temperature > 0:
            raise BadInput(f"temperature is {self.temperature}, expected a number above 0")

    def positionwise(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """One loss a position: logits (N, V) twice and target ids (N,) -> (N,). Cross-entropy ignores the teacher."""
        if self.kind == FORWARD_KL:
            return forward_kl(student, teacher, self.temperature)
        if self.kind == REVERSE_KL:
            return reverse_kl(student, teacher, self.temperature)
        if self.kind == JSD:
            return jsd(student, teacher, self.beta, self.temperature)
        return F.cross_entropy(student.float(), targets, reduction="none")


def logits_loss(
    loss: Loss, student: Tensor, teacher: Tensor, input_ids: Tensor, mask: Tensor, count: int | None = None
) -> Tensor:
    """The loss from all logits (B, L, V): the plain path that `chunked_loss` is compared with. Scalar."""
    valid = mask.sum() if count is None else count
    return loss.positionwise(student[mask], teacher[mask], next_tokens(input_ids)[mask]).sum() / valid


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a position-wise loss over hidden states whose logits exist for one chunk of positions at a time.

    The gradient is computed in the forward pass, where the logits are at hand, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        targets: Tensor,
        loss: Loss,
        chunk: int,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            student = F.linear(hidden[rows], head)
            teacher = F.linear(teacher_hidden[rows], teacher_head)
            with torch.enable_grad():
                student.requires_grad_()
                part = loss.positionwise(student, teacher, targets[rows]).sum()
            (logit_grad,) = torch.autograd.grad(part, student)
            hidden_grad[rows] = logit_grad @ head
            head_grad += logit_grad.T @ hidden[rows]
            total += part.detach()
        ctx.save_for_backward(hidden_grad, head_grad.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        return upstream * hidden_grad, upstream * head_grad, None, None, None, None, None


def chunked_loss(
    loss: Loss,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    input_ids: Tensor,
    mask: Tensor,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The loss from hidden states (B, L, D) and output projections (V, D), never holding all logits.

    `mask` (B, L) comes from `prediction_mask`; `count` defaults to its number of true entries and must be above 0;
    `chunk` positions are projected at a time, by default so many that a chunk has about four million logits. Gradients
    flow to the student's hidden states and projection alone.
    """
    valid = mask.sum() if count is None else count
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // student_head.shape[0])
    apply: Callable[..., Tensor] = _ChunkedLoss.apply
    total = apply(
        student_hidden[mask],
        student_head,
        teacher_hidden[mask],
        teacher_head,
        next_tokens(input_ids)[mask],
        loss,
        chunk,
    )
    return total / valid
