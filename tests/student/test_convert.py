import math

import pytest
import torch
import torch.nn.functional as F

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.mixer import GATE_ONE, open_gate
from thinkfast.student.convert import attention_traces, convert
from thinkfast.student.plan import LayerPlan

CONFIG = DecoderConfig(50, 32, 48, 4, 2, 8, (ATTENTION,) * 3)
H, KV, P = 4, 2, 8


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def calibration():
    return torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(1))


def test_all_layers_kept_is_the_teacher_bit_for_bit(teacher, calibration):
    student = convert(teacher, LayerPlan((0, 1, 2)), calibration)
    assert student.config == teacher.config
    for name, value in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
    assert torch.equal(student(calibration), teacher(calibration))


@pytest.mark.parametrize("init", ["attention", "random"])
def test_everything_but_replaced_mixers_is_copied_and_not_shared(teacher, calibration, init):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = convert(teacher, LayerPlan((1,), init), calibration)
    for name, value in student.state_dict().items():
        if not name.startswith(("layers.0.mixer", "layers.2.mixer")):
            assert torch.equal(value, before[name]), name
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_rows_are_q_k_v_of_each_head_and_grouped_heads_follow_repeat_kv(teacher, calibration):
    attention = teacher.layers[0].mixer
    mixer = convert(teacher, LayerPlan(), calibration).layers[0].mixer
    _, x, B, C, _ = mixer.in_proj.weight.split([H * P] * 4 + [H])
    for head in range(H):
        shared = head // (H // KV)
        rows, kv_rows = slice(head * P, (head + 1) * P), slice(shared * P, (shared + 1) * P)
        assert torch.equal(x[rows], attention.v_proj.weight[kv_rows])
        assert torch.equal(B[rows], attention.k_proj.weight[kv_rows])
        assert torch.equal(C[rows], attention.q_proj.weight[rows] * P**-0.5)
    # The oracle of stock grouped-query attention: project first, then expand (B, KV, L, P) over the query heads.
    u = torch.randn(2, 5, 32)
    expanded = attention.k_proj(u).view(2, 5, KV, P).transpose(1, 2)[:, :, None].expand(2, KV, H // KV, 5, P)
    assert torch.allclose(F.linear(u, B).view(2, 5, H, P).transpose(1, 2), expanded.reshape(2, H, 5, P), atol=1e-6)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


def test_scores_of_the_new_mixer_are_the_unrotated_attention_scores(teacher, calibration):
    attention = teacher.layers[0].mixer
    mixer = convert(teacher, LayerPlan(), calibration).layers[0].mixer
    u = torch.randn(1, 6, 32)
    _, _, B, C = mixer.in_proj(u)[0, :, : 4 * H * P].unflatten(-1, (4, H, P)).unbind(1)
    q = attention.q_proj(u).view(6, H, P)
    k = attention.k_proj(u).view(6, KV, P).repeat_interleave(H // KV, 1)
    expected = torch.einsum("ihp,jhp->hij", q, k) / math.sqrt(P)
    assert torch.allclose(torch.einsum("ihp,jhp->hij", C, B), expected, atol=1e-5)


def test_convolution_dt_and_half_lives_start_as_documented(teacher, calibration):
    mixer = convert(teacher, LayerPlan(), calibration).layers[2].mixer
    signal = torch.randn(1, mixer.shape.conv_dim, 9)
    assert torch.allclose(mixer.conv1d(F.pad(signal, (3, 0))), 0.1 * signal)
    u = torch.randn(7, 32)
    dt = F.softplus(mixer.in_proj(u)[:, -H:] + mixer.dt_bias)
    assert torch.allclose(dt, torch.full_like(dt, 0.5), atol=1e-6)
    remaining = torch.exp(-0.5 * torch.exp(mixer.A_log) * torch.tensor([8.0, 32.0, 128.0, 512.0]))
    assert torch.allclose(remaining, torch.full((4,), 0.5), atol=1e-5)
    assert torch.equal(mixer.D, torch.zeros(4))


def test_the_gate_is_open_on_the_calibration_inputs(teacher, calibration):
    student = convert(teacher, LayerPlan(), calibration)
    for index, (u, _) in enumerate(attention_traces(teacher, calibration)):
        gate = F.silu(student.layers[index].mixer.in_proj(u)[..., : H * P])
        assert gate.mean().item() == pytest.approx(1, abs=0.3)
        closed = convert(teacher, LayerPlan()).layers[index].mixer
        unfitted = F.silu(closed.in_proj(u)[..., : H * P])
        assert (gate - 1).pow(2).mean() < 0.5 * (unfitted - 1).pow(2).mean()


def test_open_gate_solves_the_ridge_problem():
    u = torch.randn(200, 6, dtype=torch.float64) + 0.5
    w = open_gate(u)
    w.requires_grad_()
    penalty = 1e-3 * u.pow(2).sum(0).mean()
    ((u @ w - GATE_ONE).pow(2).sum() + penalty * w.pow(2).sum()).backward()
    assert w.grad.abs().max() < 1e-8
    assert F.silu(torch.tensor(GATE_ONE, dtype=torch.float64)).item() == pytest.approx(1, abs=1e-9)


def test_norm_weight_fits_the_attention_output_channel_by_channel(teacher, calibration):
    student = convert(teacher, LayerPlan((0,)), calibration)
    # An oracle that shares no code with the traces: attention by hand on the second layer's input.
    u = teacher.layers[1].input_layernorm(teacher.layers[0](teacher.embed_tokens(calibration)))
    attention, mixer = teacher.layers[1].mixer, student.layers[1].mixer
    attention.o_proj, mixer.out_proj = torch.nn.Identity(), torch.nn.Identity()
    wanted, made = attention(u), mixer(u)
    # A least squares fit leaves a rest that is orthogonal, in every channel, to what was fitted.
    rest = ((wanted - made) * made).sum((0, 1))
    assert (rest.abs() < 1e-3 * (made * made).sum((0, 1))).all()
    assert (wanted - made).pow(2).sum() < wanted.pow(2).sum()


def test_without_calibration_the_norm_weight_follows_the_values(teacher):
    mixer = convert(teacher, LayerPlan((0,))).layers[1].mixer
    inputs = torch.randn(20_000, 32) * teacher.layers[1].input_layernorm.weight
    values = teacher.layers[1].mixer.v_proj(inputs).view(-1, KV, P).pow(2).mean((0, 2)).sqrt()
    expected = values.repeat_interleave(H // KV).repeat_interleave(P)
    assert torch.allclose(mixer.norm.weight, expected, rtol=0.05)


def test_calibrated_attention_rows_start_nearer_to_the_teacher_than_random_ones(teacher, calibration):
    def error(student):
        batch = torch.arange(96).view(3, 32) % 50
        return sum(
            (student.layers[index].mixer(u) - teacher.layers[index].mixer(u)).pow(2).sum()
            for index, (u, _) in enumerate(attention_traces(teacher, batch))
        )

    fitted = error(convert(teacher, LayerPlan(), calibration))
    assert fitted < error(convert(teacher, LayerPlan()))
    assert fitted < error(convert(teacher, LayerPlan(init="random")))


def test_seed_fixes_what_is_random_and_leaves_the_global_generator_alone(teacher):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (convert(teacher, LayerPlan(init="random"), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weights = [model.layers[0].mixer.in_proj.weight for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_untied_head_is_copied():
    teacher = Decoder(DecoderConfig(50, 32, 48, 4, 2, 8, (ATTENTION,), tie_word_embeddings=False))
    student = convert(teacher, LayerPlan())
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)


def test_dtype_is_kept(teacher, calibration):
    student = convert(teacher.to(torch.bfloat16), LayerPlan((1,)), calibration)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "ids", [torch.tensor([[50]]), torch.tensor([[-1]]), torch.tensor([1]), torch.empty(0, 4).long()]
)
def test_impossible_calibration_is_refused(teacher, ids):
    with pytest.raises(BadInput, match="calibration ids"):
        convert(teacher, LayerPlan(), ids)


def test_gradients_are_recorded_again_afterwards(teacher, calibration):
    convert(teacher, LayerPlan((1,)), calibration)
    assert torch.is_grad_enabled()
    traces = attention_traces(teacher, calibration)
    u, _ = next(traces)
    assert torch.is_grad_enabled()
    assert not u.requires_grad
