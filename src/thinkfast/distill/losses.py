"""Distances between the teacher's and the student's next-token distributions.

Shapes: B batch, L length, N positions, V vocabulary, D hidden. p is the teacher's distribution, q the student's, both
at softmax temperature T. Every loss is a sum over the positions of a mask divided by `count`, the number of valid
positions of the whole optimiser step (all processes, all accumulated batches), so that splitting a batch changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
SKEW_KL = "skew_kl"
SKEW_REVERSE_KL = "skew_reverse_kl"
CROSS_ENTROPY = "cross_entropy"
LOSSES = (FORWARD_KL, REVERSE_KL, JSD, SKEW_KL, SKEW_REVERSE_KL, CROSS_ENTROPY)
CHUNK_ELEMENTS = 1 << 24


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


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss by name, or a weighted sum of several. Raises BadInput unless all are defined.

    * forward_kl KL(p || q), reverse_kl KL(q || p);
    * jsd: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (arXiv 2306.13649, eq. 1); divided
      by beta it tends to the forward KL for beta -> 0;
    * skew_kl KL(p || a p + (1 - a) q), skew_reverse_kl KL(q || (1 - a) p + a q), a = `alpha` (arXiv 2402.03898, eq. 3);
    * cross_entropy -log q(token) at temperature 1, whatever the teacher says.

    All but the last are multiplied by T squared (arXiv 1503.02531, sec. 2).
    """

    kind: str | Mapping[str, float] = FORWARD_KL
    beta: float = 0.5
    temperature: float = 1.0
    alpha: float = 0.1

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in LOSSES:
                raise BadInput(f"loss is {name!r}, expected one of {', '.join(LOSSES)}")
            if not 0 <= weight < math.inf:
                raise BadInput(f"the weight of {name} is {weight}, expected a number not below 0")
        if not sum(self.weights.values()) > 0:
            raise BadInput("loss has no weight above 0")
        for field in ("beta", "alpha"):
            if not 0 < getattr(self, field) < 1:
                raise BadInput(f"{field} is {getattr(self, field)}, expected a number between 0 and 1")
        if not self.temperature > 0:
            raise BadInput(f"temperature is {self.temperature}, expected a number above 0")

    @property
    def weights(self) -> dict[str, float]:
        """Names of losses and their weights."""
        return {self.kind: 1.0} if isinstance(self.kind, str) else dict(self.kind)

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but the cross-entropy counts."""
        return any(weight for name, weight in self.weights.items() if name != CROSS_ENTROPY)

    def positionwise(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """One loss a position from the definitions: logits (N, V) twice and target ids (N,) -> (N,). The oracle of
        `chunked_loss`, differentiable in the student's logits."""
        log_q = F.log_softmax(student.float() / self.temperature, -1)
        log_p = F.log_softmax(teacher.float() / self.temperature, -1)
        p, q = log_p.exp(), log_q.exp()

        def kl(weight: Tensor, log_weight: Tensor, log_other: Tensor) -> Tensor:
            return (weight * (log_weight - log_other)).sum(-1)

        total = torch.zeros_like(log_q[..., 0])
        for name, weight in self.weights.items():
            if name == CROSS_ENTROPY:
                total = total + weight * F.cross_entropy(student.float(), targets, reduction="none")
                continue
            if name == FORWARD_KL:
                value = kl(p, log_p, log_q)
            elif name == REVERSE_KL:
                value = kl(q, log_q, log_p)
            elif name == JSD:
                log_m = _log_mixture(log_p, log_q, self.beta)
                value = self.beta * kl(p, log_p, log_m) + (1 - self.beta) * kl(q, log_q, log_m)
            elif name == SKEW_KL:
                value = kl(p, log_p, _log_mixture(log_p, log_q, self.alpha))
            else:
                value = kl(q, log_q, _log_mixture(log_p, log_q, 1 - self.alpha))
            total = total + weight * self.temperature**2 * value
        return total

    def value_and_gradient(self, student: Tensor, teacher: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over positions and its gradient in the student's logits, (N, V) in float32.

        `student` and `teacher` (N, V), the latter None where it is not needed, are float32 and are overwritten: a few
        passes over memory that is still in a cache cost less than what autograd would keep.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        weights = {name: weight for name, weight in self.weights.items() if weight}
        if hard := weights.pop(CROSS_ENTROPY, 0.0):
            plain = student.clone() if weights else student
            log_q = _log_softmax_(plain)
            picked = log_q.gather(-1, targets[:, None])
            gradient = log_q.exp_().scatter_add_(-1, targets[:, None], -torch.ones_like(picked))
            parts.append((-hard * picked.sum(), gradient if hard == 1 else gradient.mul_(hard)))
        if weights:
            if teacher is None:
                raise ValueError("this loss needs the teacher's logits")
            scale = self.temperature**2
            log_q, log_p = _log_softmax_(student, self.temperature), _log_softmax_(teacher, self.temperature)
            last = len(weights) - 1
            for place, (name, weight) in enumerate(weights.items()):
                keep = place < last
                ours = (log_q.clone(), log_p.clone()) if keep else (log_q, log_p)
                value, gradient = _GRADIENTS[name](self, *ours)
                # d(T^2 f)/d logits = T^2 df/d log q / T
                parts.append((weight * scale * value, _scaled_(gradient, weight * self.temperature)))
        value, gradient = parts[0]
        for other, slope in parts[1:]:
            value, gradient = value + other, gradient.add_(slope)
        return value, gradient


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _log_softmax_(logits: Tensor, temperature: float = 1.0) -> Tensor:
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _scaled_(gradient: Tensor, factor: float) -> Tensor:
    return gradient if factor == 1 else gradient.mul_(factor)


# Each of these takes (loss, log q, log p), may overwrite both, and returns the divergence summed over the positions and
# its gradient in the student's logits at temperature 1: q (g - sum_v q g), where g is its derivative in q.


def _forward(loss: Loss, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
    return value, log_q.exp_().sub_(p)


def _reverse(loss: Loss, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    rows = torch.linalg.vecdot(q, ratio)[:, None]
    return rows.sum(), ratio.sub_(rows).mul_(q)


def _jsd(loss: Loss, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, loss.beta)
    p = log_p.exp()
    from_teacher = torch.linalg.vecdot(p, log_p.sub_(log_m)).sum()
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = log_q.exp_()
    rows = torch.linalg.vecdot(q, ratio)[:, None]
    value = loss.beta * from_teacher + (1 - loss.beta) * rows.sum()
    return value, ratio.sub_(rows).mul_(q).mul_(1 - loss.beta)


def _skew(loss: Loss, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, loss.alpha)
    p = log_p.exp()
    ratio = log_p.sub_(log_m)
    value = torch.linalg.vecdot(p, ratio).sum()
    q, slope = log_q.exp_(), ratio.exp_()
    return value, slope.sub_(torch.linalg.vecdot(q, slope)[:, None]).mul_(q).mul_(loss.alpha - 1)


def _skew_reverse(loss: Loss, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, 1 - loss.alpha)
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = log_q.exp_()
    value = torch.linalg.vecdot(q, ratio).sum()
    slope = torch.exp(ratio, out=log_p).mul_(-loss.alpha).add_(ratio)
    return value, slope.sub_(torch.linalg.vecdot(q, slope)[:, None]).mul_(q)


_GRADIENTS: dict[str, Callable[[Loss, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    FORWARD_KL: _forward,
    REVERSE_KL: _reverse,
    JSD: _jsd,
    SKEW_KL: _skew,
    SKEW_REVERSE_KL: _skew_reverse,
}


@dataclass(frozen=True, slots=True)
class LossSchedule:
    """`first` until the share blend[0] of the tokens, `last` from blend[1] on, in between both with weights that change
    linearly. A student far from its teacher learns little from a reverse KL, so that should come last."""

    first: Loss
    last: Loss | None = None
    blend: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.blend[0] <= self.blend[1] <= 1:
            raise BadInput(f"blend is {list(self.blend)}, expected two rising shares between 0 and 1")
        if self.last is not None and self._constants(self.last) != self._constants(self.first):
            raise BadInput("the first and the last loss have different constants, expected the same")

    @staticmethod
    def _constants(loss: Loss) -> tuple[float, ...]:
        return loss.beta, loss.temperature, loss.alpha

    def at(self, share: float) -> Loss:
        """The loss after a share of the tokens."""
        start, end = self.blend
        if self.last is None or share < start:
            return self.first
        if share >= end:
            return self.last
        through = (share - start) / (end - start)
        mixed = {name: (1 - through) * weight for name, weight in self.first.weights.items()}
        for name, weight in self.last.weights.items():
            mixed[name] = mixed.get(name, 0.0) + through * weight
        return Loss(mixed, self.first.beta, self.first.temperature, self.first.alpha)


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
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        targets: Tensor,
        loss: Loss,
        chunk: int,
        training: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if training else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if training else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            student = F.linear(hidden[rows], head).float()
            teacher = None
            if teacher_hidden is not None and teacher_head is not None:
                teacher = F.linear(teacher_hidden[rows], teacher_head).float()
            part, logit_grad = loss.value_and_gradient(student, teacher, targets[rows])
            total += part
            if hidden_grad is None or head_grad is None:
                continue
            logit_grad = logit_grad.to(head.dtype)
            torch.mm(logit_grad, head, out=hidden_grad[rows])
            if head.dtype == torch.float32:
                head_grad.addmm_(logit_grad.T, hidden[rows])
            else:
                head_grad += logit_grad.T @ hidden[rows]
        if hidden_grad is not None and head_grad is not None:
            ctx.save_for_backward(hidden_grad, head_grad.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        return upstream * hidden_grad, upstream * head_grad, None, None, None, None, None, None


def chunked_loss(
    loss: Loss,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    input_ids: Tensor,
    mask: Tensor,
    count: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The loss from hidden states (B, L, D) and output projections (V, D), never holding all logits.

    `mask` (B, L) comes from `prediction_mask`; `count` defaults to its number of true entries and must be above 0;
    `chunk` positions are projected at a time, by default so many that a chunk has about sixteen million logits.
    Gradients flow to the student's hidden states and projection alone; the teacher's may be None where the loss does
    not need them. Raises BadInput for vocabularies of different size: there is nothing to compare the rest with.
    """
    if loss.needs_teacher:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError("this loss needs the teacher's hidden states and projection")
        if teacher_head.shape[0] != student_head.shape[0]:
            sizes = f"{teacher_head.shape[0]} tokens and the student {student_head.shape[0]}"
            raise BadInput(f"the teacher has {sizes}, expected the same vocabulary")
    valid = mask.sum() if count is None else count
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // student_head.shape[0])
    training = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    apply: Callable[..., Tensor] = _ChunkedLoss.apply
    total = apply(
        student_hidden[mask],
        student_head,
        teacher_hidden[mask] if teacher_hidden is not None and loss.needs_teacher else None,
        teacher_head if loss.needs_teacher else None,
        next_tokens(input_ids)[mask],
        loss,
        chunk,
        training,
    )
    return total / valid
