"""Students of teachers with a bias on queries, keys and values (Qwen2), or with normed queries and keys (Qwen3)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.layers import RMSNorm
from thinkfast.model.mixer import CONV_GAIN, norm_factors
from thinkfast.student.convert import attention_traces, convert
from thinkfast.student.plan import LayerPlan, plan_document

PLAIN = DecoderConfig(50, 32, 48, 4, 2, 8, (ATTENTION,) * 3)
BIASED = replace(PLAIN, qkv_bias=True, family="qwen2")
NORMED = replace(PLAIN, qk_norm=True, family="qwen3")
H, KV, P = 4, 2, 8


def random_teacher(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval()


@pytest.fixture
def calibration():
    return torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_biases_reach_what_the_scan_reads_exactly(calibration):
    teacher = random_teacher(BIASED)
    attention = teacher.layers[1].mixer
    for student in (convert(teacher, LayerPlan(), calibration), convert(teacher, LayerPlan())):
        mixer = student.layers[1].mixer
        u = torch.randn(1, 7, 32)
        inputs = mixer.in_proj(u)[..., H * P : 4 * H * P].transpose(1, 2)
        x, B, C = mixer.conv1d(F.pad(inputs, (3, 0)))[0].view(3, H, P, 7) / CONV_GAIN
        for got, projection in ((x, attention.v_proj), (B, attention.k_proj)):
            want = projection(u)[0].view(7, KV, P).repeat_interleave(H // KV, 1).permute(1, 2, 0)
            assert torch.allclose(got, want, atol=1e-5)
        assert torch.allclose(C, attention.q_proj(u)[0].view(7, H, P).permute(1, 2, 0) * P**-0.5, atol=1e-5)


@torch.no_grad()
def test_the_norm_of_values_counts_their_bias():
    teacher = random_teacher(BIASED)
    mixer = convert(teacher, LayerPlan()).layers[1].mixer
    inputs = torch.randn(20_000, 32) * teacher.layers[1].input_layernorm.weight
    values = teacher.layers[1].mixer.v_proj(inputs).view(-1, KV, P).pow(2).mean((0, 2)).sqrt()
    assert torch.allclose(mixer.norm.weight, values.repeat_interleave(H // KV).repeat_interleave(P), rtol=0.05)


@torch.no_grad()
def test_norm_factors_are_the_least_squares_answer():
    norm, rows, u = RMSNorm(P, 1e-3), torch.randn(2 * P, 32), torch.randn(3, 40, 32)
    norm.weight.copy_(torch.rand(P) + 0.5)
    heads = F.linear(u, rows).view(-1, 2, P)
    wanted = norm(heads) / norm.weight
    made = heads * (norm_factors(rows, norm, torch.ones(32), u).view(2, P) / norm.weight)
    rest = ((wanted - made) * heads).sum((0, 2))
    assert (rest.abs() < 1e-4 * (made * heads).sum((0, 2))).all()


@torch.no_grad()
def test_norm_factors_without_inputs_are_near_those_with_typical_ones():
    norm, rows, weight = RMSNorm(P, 1e-5), torch.randn(2 * P, 32), torch.rand(32) + 0.5
    expected = norm_factors(rows, norm, weight, torch.randn(20_000, 32) * weight)
    assert torch.allclose(norm_factors(rows, norm, weight, None), expected, rtol=0.15)


@torch.no_grad()
def test_scores_of_a_pure_student_follow_normed_scores(calibration):
    teacher = random_teacher(NORMED)
    student = convert(teacher, LayerPlan(), calibration)
    for index, (u, _) in enumerate(attention_traces(teacher, calibration)):
        attention, mixer = teacher.layers[index].mixer, student.layers[index].mixer
        _, _, B, C = mixer.in_proj(u)[..., : 4 * H * P].unflatten(-1, (4, H, P)).unbind(2)
        q = attention.q_norm(attention.q_proj(u).unflatten(-1, (H, P)))
        k = attention.k_norm(attention.k_proj(u).unflatten(-1, (KV, P))).repeat_interleave(H // KV, 2)
        wanted = torch.einsum("bihp,bjhp->bhij", q, k) * P**-0.5
        got = torch.einsum("bihp,bjhp->bhij", C, B)
        assert (got - wanted).pow(2).mean() < 0.2 * wanted.pow(2).mean()


@pytest.mark.parametrize(("config", "kept"), [(BIASED, (1,)), (BIASED, ()), (NORMED, ()), (BIASED, (0, 1, 2))])
@torch.no_grad()
def test_students_are_saved_and_loaded_as_they_are(tmp_path, calibration, config, kept):
    student = convert(random_teacher(config), LayerPlan(kept), calibration)
    assert not student.config.qk_norm
    assert student.config.qkv_bias == (config.qkv_bias and bool(kept))
    save_model(student, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == student.config
    assert torch.equal(loaded(calibration), student(calibration))


def test_normed_layers_cannot_stay_in_a_hybrid():
    with pytest.raises(
        BadInput, match=r"attention layers: 2 would stay, but the teacher norms queries and keys"
    ) as caught:
        LayerPlan((2,)).student_config(NORMED)
    assert "\n" not in str(caught.value)
    assert LayerPlan((0, 1, 2)).student_config(NORMED) == NORMED


@pytest.mark.parametrize(("config", "kept"), [(BIASED, (1,)), (NORMED, ()), (NORMED, (0, 1, 2))])
def test_the_plan_counts_every_number(config, kept):
    document = plan_document(LayerPlan(kept), config, calibrated=True)
    model = Decoder(LayerPlan(kept).student_config(config))
    assert sum(document["parameters"].values()) == sum(parameter.numel() for parameter in model.parameters())
    names = {tensor["name"].split("[")[0] for layer in document["layers"] for tensor in layer["tensors"]}
    assert names == {name for name in model.state_dict() if name.startswith("layers.")}
