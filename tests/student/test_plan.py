import json
from dataclasses import replace

import pytest

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.student.plan import LayerPlan, every, plan_document, render_plan

TEACHER = DecoderConfig(50, 32, 48, 4, 2, 8, (ATTENTION,) * 4)


def test_named_layers_stay_and_the_mamba_shape_follows_the_teacher():
    config = LayerPlan((1, 3)).student_config(TEACHER)
    assert config.layer_types == (MAMBA, ATTENTION, MAMBA, ATTENTION)
    assert config.mamba == MambaConfig(n_heads=4, head_dim=8, d_state=8, n_groups=4, chunk_size=8)
    assert config.with_layers(TEACHER.layer_types, None) == TEACHER


def test_keeping_everything_is_the_teacher():
    assert LayerPlan((3, 0, 1, 2)).student_config(TEACHER) == TEACHER


def test_wider_mixers_than_the_model_are_allowed_in_whole_steps():
    config = LayerPlan().student_config(replace(TEACHER, head_dim=16))
    assert config.mamba == MambaConfig(n_heads=4, head_dim=16, d_state=16, n_groups=4, chunk_size=16)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LayerPlan((1, 2, 1)), "1 is named twice"),
        (LayerPlan((4,)), r"4 is out of range, the teacher has layers 0\.\.3"),
        (LayerPlan((-1,)), "-1 is out of range"),
        (LayerPlan((True,)), "True is not a layer number"),
        (LayerPlan((1.0,)), "1.0 is not a layer number"),
        (LayerPlan(("1",)), "'1' is not a layer number"),
        (LayerPlan(init="qkv"), "init is 'qkv'"),
        (LayerPlan(init="random", n_groups=3), "n_groups is 3, expected a divisor of the 4 heads"),
        (LayerPlan(init="random", n_groups=0), "n_groups is 0"),
        (LayerPlan(n_groups=2), "init 'attention' needs one group for each"),
    ],
)
def test_impossible_plans_are_refused_in_one_line(plan, message):
    with pytest.raises(BadInput, match=message) as caught:
        plan.student_config(TEACHER)
    assert "\n" not in str(caught.value)


def test_a_width_the_stock_layout_cannot_hold_is_refused():
    with pytest.raises(BadInput, match="4 heads of 6 are no multiple of hidden_size 32"):
        LayerPlan().student_config(replace(TEACHER, head_dim=6))


def test_a_hybrid_teacher_is_refused():
    with pytest.raises(BadInput, match="the teacher has mamba layers"):
        LayerPlan().student_config(LayerPlan((1,)).student_config(TEACHER))


@pytest.mark.parametrize(
    ("layers", "stride", "expected"),
    [(4, 1, (0, 1, 2, 3)), (4, 2, (1, 3)), (4, 4, (2,)), (28, 5, (2, 7, 12, 17, 22, 27))],
)
def test_every_spreads_layers_evenly(layers, stride, expected):
    assert every(layers, stride) == expected


def test_every_refuses_a_stride_of_zero():
    with pytest.raises(BadInput, match="stride is 0"):
        every(4, 0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "plan", [LayerPlan((1,)), LayerPlan(), LayerPlan(init="random", n_groups=2), LayerPlan((0, 1, 2, 3))]
)
def test_the_document_names_every_tensor_once_and_counts_every_parameter(plan, tied):
    teacher = replace(TEACHER, tie_word_embeddings=tied)
    student = Decoder(plan.student_config(teacher))
    document = plan_document(plan, teacher, calibrated=True)
    tensors = [tensor for layer in document["layers"] for tensor in layer["tensors"]] + document["tensors"]
    names = [tensor["name"] for tensor in tensors]
    assert len(names) == len(set(names))
    assert {name.split("[")[0] for name in names} == set(dict(student.named_parameters()))
    assert sum(document["parameters"].values()) == sum(p.numel() for p in student.parameters())
    assert json.loads(json.dumps(document)) == document


def test_the_document_tells_copied_from_initialised_from_new():
    document = plan_document(LayerPlan((1,)), TEACHER, calibrated=True)
    assert [(layer["teacher"], layer["student"]) for layer in document["layers"]] == [
        (ATTENTION, MAMBA),
        (ATTENTION, ATTENTION),
        (ATTENTION, MAMBA),
        (ATTENTION, MAMBA),
    ]
    assert {tensor["how"] for tensor in document["layers"][1]["tensors"]} == {"copied"}
    made = {tensor["name"]: tensor for tensor in document["layers"][0]["tensors"]}
    assert made["layers.0.mixer.in_proj.weight[x]"]["source"] == "v_proj"
    assert made["layers.0.mixer.in_proj.weight[z]"]["how"] == "initialised"
    assert made["layers.0.mixer.A_log"]["how"] == "new"
    unfitted = plan_document(LayerPlan((1,)), TEACHER, calibrated=False)["layers"][0]["tensors"]
    assert {t["name"]: t["how"] for t in unfitted}["layers.0.mixer.in_proj.weight[z]"] == "new"
    fresh = plan_document(LayerPlan(init="random"), TEACHER, calibrated=True)["layers"][0]["tensors"]
    assert {t["how"] for t in fresh if ".mixer." in t["name"]} == {"new"}


def test_the_table_has_a_line_for_each_layer():
    lines = render_plan(plan_document(LayerPlan((1,)), TEACHER, calibrated=True)).splitlines()
    assert len(lines) == 6
    assert "in_proj[z] from layer inputs, least squares" in lines[1]
    assert lines[2].split() == ["1", "attention", "attention", "9", "copied"]
    assert lines[-1].startswith("parameters: ")
