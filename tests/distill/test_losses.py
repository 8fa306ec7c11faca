import math

import pytest
import torch

from thinkfast.distill.losses import (
    CROSS_ENTROPY,
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    Loss,
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
    Loss(CROSS_ENTROPY),
]


def ids(loss):
    return f"{loss.kind}-b{loss.beta}-T{loss.temperature}"


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
            value = {
                FORWARD_KL: lambda p=p, q=q: (p * (p / q).log()).sum(),
                REVERSE_KL: lambda p=p, q=q: (q * (q / p).log()).sum(),
                JSD: lambda p=p, q=q, m=m: (
                    loss.beta * (p * (p / m).log()).sum() + (1 - loss.beta) * (q * (q / m).log()).sum()
                ),
            }
            if loss.kind == CROSS_ENTROPY:
                total = total - torch.softmax(student[row, t - 1].double(), 0)[input_ids[row, t]].log()
            else:
                total = total + loss.temperature**2 * value[loss.kind]()
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
    mask = prediction_mask(completion)
    results = []
    for path in ("oracle", "logits", "chunked", "one by one"):
        hidden, head = s.clone().requires_grad_(), s_head.clone().requires_grad_()
        if path == "oracle":
            value = oracle(loss, hidden @ head.T, t @ t_head.T, input_ids, completion)
        elif path == "logits":
            value = logits_loss(loss, hidden @ head.T, t @ t_head.T, input_ids, mask)
        else:
            chunk = 1 if path == "one by one" else 4
            value = chunked_loss(loss, hidden, head, t, t_head, input_ids, mask, chunk=chunk)
        (3 * value).backward()
        results.append((value.detach().float(), hidden.grad, head.grad))
    for value, hidden_grad, head_grad in results[1:]:
        assert value.item() == pytest.approx(results[0][0].item(), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(hidden_grad, results[0][1], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(head_grad, results[0][2], rtol=1e-5, atol=5e-6)


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
    for loss in LOSSES[:-1]:
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
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_undefined_losses_are_refused(settings, word):
    with pytest.raises(BadInput, match=word):
        Loss(**settings)
