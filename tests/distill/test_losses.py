import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thinkfast.distill.losses import (
    CROSS_ENTROPY,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    SKEW_KL,
    SKEW_REVERSE_KL,
    Loss,
    LossSchedule,
    chunked_loss,
    logits_loss,
    next_tokens,
    prediction_mask,
)
from thinkfast.errors import BadInput

LOSSES = [
    Loss(FORWARD_KL),
    Loss(FORWARD_KL, temperature=2.0),
    Loss(REVERSE_KL),
    Loss(REVERSE_KL, temperature=0.5),
    Loss(JSD, beta=0.1),
    Loss(JSD, beta=0.7, temperature=3.0),
    Loss(SKEW_KL, temperature=2.0),
    Loss(SKEW_REVERSE_KL, alpha=0.4),
    Loss({FORWARD_KL: 0.7, CROSS_ENTROPY: 0.3}, temperature=2.0),
    Loss({FORWARD_KL: 1.0, REVERSE_KL: 2.0, JSD: 0.5, SKEW_KL: 0.2, CROSS_ENTROPY: 0.0}),
    Loss(CROSS_ENTROPY),
]


def ids(loss):
    return f"{'+'.join(loss.weights)}-b{loss.beta}-T{loss.temperature}"


def oracle(loss, student, teacher, input_ids, completion):
    """One position after the other, in double precision, from the definitions."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(input_ids.shape[0]):
        for t in range(1, input_ids.shape[1]):
            if not completion[row, t]:
                continue
            p = torch.softmax(teacher[row, t - 1].double() / loss.temperature, 0)
            q = torch.softmax(student[row, t - 1].double() / loss.temperature, 0)
            m = loss.beta * p + (1 - loss.beta) * q
            toward_p, toward_q = loss.alpha * p + (1 - loss.alpha) * q, (1 - loss.alpha) * p + loss.alpha * q
            values = {
                FORWARD_KL: (p * (p / q).log()).sum(),
                REVERSE_KL: (q * (q / p).log()).sum(),
                JSD: loss.beta * (p * (p / m).log()).sum() + (1 - loss.beta) * (q * (q / m).log()).sum(),
                SKEW_KL: (p * (p / toward_p).log()).sum(),
                SKEW_REVERSE_KL: (q * (q / toward_q).log()).sum(),
            }
            plain = -torch.log_softmax(student[row, t - 1].double(), 0)[input_ids[row, t]]
            for name, weight in loss.weights.items():
                value = plain if name == CROSS_ENTROPY else loss.temperature**2 * values[name]
                total = total + weight * value
            count += 1
    return total / count


def case(rows=3, length=7, vocab=11, hidden=5):
    torch.manual_seed(0)
    input_ids = torch.randint(0, vocab, (rows, length))
    starts, ends = torch.tensor([2, 1, 4]), torch.tensor([7, 5, 6])
    slots = torch.arange(length)
    completion = (slots >= starts[:, None]) & (slots < ends[:, None])
    states = [torch.randn(rows, length, hidden) for _ in range(2)]
    heads = [torch.randn(vocab, hidden) for _ in range(2)]
    return input_ids, completion, states, heads


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_both_paths_equal_the_definition_in_value_and_gradient(loss):
    input_ids, completion, (s, t), (s_head, t_head) = case()
    s, t = s / 2, t / 2  # logits of usual size: float32 itself loses a millionth of large ones
    mask = prediction_mask(completion)
    results = {}
    for path in ("oracle", "logits", "chunked", "one by one"):
        kind = torch.float64 if path == "oracle" else torch.float32
        hidden, head = (x.to(kind, copy=True).requires_grad_() for x in (s, s_head))
        if path == "oracle":
            value = oracle(loss, hidden @ head.T, t.double() @ t_head.double().T, input_ids, completion)
        elif path == "logits":
            value = logits_loss(loss, hidden @ head.T, t @ t_head.T, input_ids, mask)
        else:
            chunk = 1 if path == "one by one" else 4
            value = chunked_loss(loss, hidden, head, t, t_head, input_ids, mask, chunk=chunk)
        (3 * value).backward()
        results[path] = (value.detach().double(), hidden.grad.double(), head.grad.double())
    for path in ("logits", "chunked", "one by one"):
        for found, exact in zip(results[path], results["oracle"], strict=True):
            assert (found - exact).abs().max() <= 1e-6 * exact.abs().max(), path


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_evaluation_gives_the_same_value_and_needs_no_gradient(loss):
    input_ids, completion, (s, t), (s_head, t_head) = case()
    mask = prediction_mask(completion)
    trained = chunked_loss(loss, s.clone().requires_grad_(), s_head, t, t_head, input_ids, mask)
    with torch.no_grad():
        assert chunked_loss(loss, s, s_head, t, t_head, input_ids, mask) == trained


def test_cross_entropy_needs_no_teacher_and_the_others_do():
    input_ids, completion, (s, t), (s_head, t_head) = case()
    mask = prediction_mask(completion)
    alone = chunked_loss(Loss(CROSS_ENTROPY), s, s_head, None, None, input_ids, mask)
    assert alone == chunked_loss(Loss(CROSS_ENTROPY), s, s_head, t, t_head, input_ids, mask)
    with pytest.raises(ValueError, match="needs the teacher"):
        chunked_loss(Loss(), s, s_head, None, None, input_ids, mask)


def test_unequal_vocabularies_are_refused():
    input_ids, completion, (s, t), (s_head, t_head) = case()
    with pytest.raises(BadInput, match="the teacher has 11 tokens and the student 9"):
        chunked_loss(Loss(), s, s_head[:9], t, t_head, input_ids, prediction_mask(completion))


def test_the_prompt_gives_no_gradient_to_the_projection_either():
    input_ids, completion, (s, t), (s_head, t_head) = case()
    mask, grads = prediction_mask(completion), []
    for spoilt in (False, True):
        head = s_head.clone().requires_grad_()
        hidden = torch.where(mask[..., None] | torch.tensor(not spoilt), s, 100.0)
        chunked_loss(Loss(), hidden, head, t, t_head, input_ids, mask).backward()
        grads.append(head.grad)
    assert torch.equal(*grads)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that was made, and how many tensors were."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)), 0)
        return out


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_never_more_logits_than_a_chunk_of_them(loss):
    positions, vocab, width, chunk = 64, 900, 8, 4
    states = [torch.randn(1, positions, width, requires_grad=True) for _ in range(2)]
    heads = [torch.randn(vocab, width, requires_grad=True) for _ in range(2)]
    tokens = torch.randint(0, vocab, (1, positions))
    mask = prediction_mask(torch.ones(1, positions, dtype=torch.bool))
    with Largest() as largest:
        given = states[0], heads[0], states[1].detach(), heads[1].detach(), tokens, mask
        chunked_loss(loss, *given, chunk=chunk).backward()
    assert heads[0].grad is not None
    assert largest.size <= max(chunk, width) * vocab < positions * vocab / 4


def test_a_wide_vocabulary_in_bfloat16_is_near_the_exact_gradient():
    torch.manual_seed(1)
    ids_, mask = torch.randint(0, 5000, (1, 9)), torch.ones(1, 9, dtype=torch.bool)
    s, t = (torch.randn(1, 9, 64) for _ in range(2))
    heads = [torch.randn(5000, 64) * 0.1 for _ in range(2)]
    grads = []
    for kind in (torch.float64, torch.bfloat16):
        hidden = s.to(torch.bfloat16).to(kind).requires_grad_()
        both = [head.to(torch.bfloat16).to(kind) for head in heads]
        inputs = (hidden, both[0], t.to(torch.bfloat16).to(kind), both[1])
        if kind == torch.float64:
            logits_loss(Loss(), inputs[0] @ both[0].T, inputs[2] @ both[1].T, ids_, mask).backward()
        else:
            chunked_loss(Loss(), *inputs, ids_, mask, chunk=2).backward()
        grads.append(hidden.grad.double())
    assert (grads[1] - grads[0]).norm() < 2e-2 * grads[0].norm()


def test_a_schedule_moves_the_weights_linearly_between_its_two_shares():
    schedule = LossSchedule(Loss(FORWARD_KL, beta=0.3), Loss({REVERSE_KL: 0.5}, beta=0.3), (0.25, 0.75))
    assert schedule.at(0.0).weights == {FORWARD_KL: 1.0}
    assert schedule.at(0.25).weights == {FORWARD_KL: 1.0, REVERSE_KL: 0.0}
    assert schedule.at(0.5).weights == {FORWARD_KL: 0.5, REVERSE_KL: 0.25}
    assert schedule.at(0.5).beta == 0.3
    assert schedule.at(0.75).weights == schedule.at(1.0).weights == {REVERSE_KL: 0.5}
    assert LossSchedule(Loss(JSD)).at(0.9) == Loss(JSD)
    with pytest.raises(BadInput, match=r"blend is \[0\.8, 0\.2\]"):
        LossSchedule(Loss(), Loss(JSD), (0.8, 0.2))
    with pytest.raises(BadInput, match="different constants"):
        LossSchedule(Loss(), Loss(JSD, temperature=2.0))


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_prompt_and_padding_give_no_gradient_and_the_first_completion_token_counts(loss):
    input_ids, completion, (s, t), (s_head, t_head) = case()
    hidden = s.clone().requires_grad_()
    chunked_loss(loss, hidden, s_head, t, t_head, input_ids, prediction_mask(completion)).backward()
    felt = hidden.grad.abs().sum(-1) > 0
    # Completions are tokens 2..6, 1..4 and 4..5: they are predicted one position earlier.
    assert felt.int().tolist() == [[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_padding_and_splitting_change_nothing(loss):
    input_ids, completion, (s, t), (s_head, t_head) = case()
    mask = prediction_mask(completion)
    whole = chunked_loss(loss, s, s_head, t, t_head, input_ids, mask)

    def padded(x):
        return torch.cat((x, torch.ones_like(x[:, :3])), 1)

    longer = torch.cat((mask, torch.zeros(3, 3, dtype=torch.bool)), 1)
    assert torch.allclose(
        chunked_loss(loss, padded(s), s_head, padded(t), t_head, padded(input_ids), longer), whole, atol=1e-6
    )
    count = int(mask.sum())
    parts = [
        chunked_loss(loss, s[r], s_head, t[r], t_head, input_ids[r], mask[r], count) for r in (slice(0, 1), slice(1, 3))
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-6)


def test_equal_models_have_no_divergence():
    input_ids, completion, (s, _), (head, _) = case()
    for loss in LOSSES:
        if loss.weights.get(CROSS_ENTROPY):
            continue
        value = chunked_loss(loss, s, head, s, head, input_ids, prediction_mask(completion))
        assert abs(value.item()) < 1e-5


def test_jsd_over_beta_tends_to_forward_kl():
    input_ids, completion, (s, t), (s_head, t_head) = case()
    arguments = (0.3 * s @ s_head.T, 0.3 * t @ t_head.T, input_ids, prediction_mask(completion))
    beta = 1e-3
    small = logits_loss(Loss(JSD, beta=beta), *arguments) / beta
    assert small.item() == pytest.approx(logits_loss(Loss(FORWARD_KL), *arguments).item(), rel=0.05)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[[1e4, -1e4, 0.0]]]).expand(1, 2, 3).clone().requires_grad_()
    teacher = torch.tensor([[[-1e4, 1e4, 0.0]]]).expand(1, 2, 3)
    mask, tokens = torch.tensor([[True, False]]), torch.tensor([[0, 1]])
    for loss in LOSSES:
        value = logits_loss(loss, student, teacher, tokens, mask)
        (gradient,) = torch.autograd.grad(value, student)
        assert math.isfinite(value.item())
        assert gradient.isfinite().all()


def test_next_tokens_shift_by_one():
    assert next_tokens(torch.tensor([[4, 5, 6]])).tolist() == [[5, 6, 0]]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kind": "kl"}, "'kl'"),
        ({"kind": {"forward_kl": 1.0, "kl": 1.0}}, "'kl'"),
        ({"kind": {"forward_kl": -1.0}}, "weight of forward_kl is -1.0"),
        ({"kind": {"forward_kl": 0.0}}, "no weight above 0"),
        ({"kind": {}}, "no weight above 0"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_undefined_losses_are_refused(settings, word):
    with pytest.raises(BadInput, match=word):
        Loss(**settings)
