"""The arithmetic of a plan, against counts of real modules and of torch's own FLOP counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from thinkfast.distill import cost as cost_module
from thinkfast.distill.cost import (
    CARDS,
    GIB,
    Phase,
    Setting,
    cost,
    flops,
    forward_flops,
    memory,
    parse_gpus,
    peak_here,
    sizes,
)
from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Block, Decoder
from thinkfast.ops.cpu import training
from thinkfast.student.plan import LayerPlan

TEACHER = DecoderConfig(500, 64, 96, 4, 2, 16, (ATTENTION,) * 4)
PHASE = Phase("distill", 1e6, 512, 128)
SETTING = Setting(1, half=False, recompute=False)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"qkv_bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("mixer", ["mamba2", "discrete", "mamba1"])
def test_parameters_are_counted_as_modules_have_them(changes, mixer):
    teacher = replace(TEACHER, **changes)
    for config in (teacher, LayerPlan((), mixer=mixer).student_config(teacher)):
        model = Decoder(config)
        found = sizes(config)
        assert found.whole == sum(parameter.numel() for parameter in model.parameters())
        inside = sum(parameter.numel() for parameter in model.layers.parameters())
        norms = 2 * config.hidden_size * config.num_layers
        assert found.root == found.whole - inside
        mixers = [layer.mixer for layer in model.layers if isinstance(layer, Block)]
        assert found.unit >= max(sum(p.numel() for p in mixer.parameters()) for mixer in mixers)
        assert found.recurrent + norms <= found.whole


def test_flops_of_products_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "usable", lambda *_: False)  # torch cannot see into the kernels
    model = Decoder(TEACHER)
    ids = torch.zeros(2, 128, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    # torch counts attention over the whole square, a plan the lower half of it.
    square = 2 * 2 * 128 * TEACHER.num_heads * TEACHER.head_dim * TEACHER.num_layers
    counted = counter.get_total_flops() / ids.numel()
    attended = counted if counted > forward_flops(TEACHER, 128) else counted + square
    assert forward_flops(TEACHER, 128) + square / 2 == pytest.approx(attended, rel=0.02)


def test_a_step_is_the_teachers_forward_and_three_or_four_of_the_student():
    student = LayerPlan((1,)).student_config(TEACHER)
    taught, learnt = forward_flops(TEACHER, 128), forward_flops(student, 128)
    assert flops(TEACHER, student, PHASE, recompute=False) == pytest.approx(1e6 * (taught + 3 * learnt))
    assert flops(TEACHER, student, PHASE, recompute=True) == pytest.approx(1e6 * (taught + 4 * learnt))
    alone = replace(PHASE, taught=False)
    assert flops(TEACHER, student, alone, recompute=False) == pytest.approx(3e6 * learnt)


def test_more_processes_share_weights_and_hours_but_not_activations():
    student = LayerPlan((1,)).student_config(TEACHER)
    one, eight = (memory(TEACHER, student, PHASE, replace(SETTING, processes=count)) for count in (1, 8))
    for name in ("student", "optimizer", "teacher"):
        assert eight[name] == pytest.approx(one[name] / 8)
    for name in ("gathered", "activations", "loss", "reserve"):
        assert eight[name] == one[name]
    assert one["student"] == 8 * sizes(student).whole
    assert one["optimizer"] == 8 * sizes(student).whole
    card = CARDS["h100"]
    hours = [cost(TEACHER, student, PHASE, replace(SETTING, processes=count), card).hours for count in (1, 8)]
    assert hours[0] == pytest.approx(8 * hours[1])


def test_recomputing_and_bfloat16_take_less_memory():
    student = LayerPlan((1,)).student_config(TEACHER)
    kept, again = (memory(TEACHER, student, PHASE, replace(SETTING, recompute=flag)) for flag in (False, True))
    assert again["activations"] < 0.5 * kept["activations"]
    half = memory(TEACHER, student, PHASE, replace(SETTING, half=True))
    assert half["teacher"] == kept["teacher"] / 2
    assert half["student"] == kept["student"]
    assert half["activations"] < kept["activations"]


def test_layerwise_training_has_moments_of_the_mixers_alone():
    student = LayerPlan((1,)).student_config(TEACHER)
    found = memory(TEACHER, student, replace(PHASE, layerwise=True), SETTING)
    assert found["optimizer"] == 8 * sizes(student).recurrent


@pytest.mark.parametrize(
    ("text", "count", "name"), [("8xH100", 8, "H100"), ("a100", 1, "A100"), ("2xA100-40", 2, "A100-40")]
)
def test_gpus_are_a_number_and_a_card(text, count, name):
    assert parse_gpus(text) == (count, CARDS[name.lower()])
    assert CARDS["h100"].memory == 80 * GIB


@pytest.mark.parametrize("text", ["", "8", "8xH1000", "0xH100", "H100x8", "-1xH100"])
def test_other_gpus_are_refused(text):
    with pytest.raises(BadInput, match=r"expected a number and a card, e\.g\. 8xH100"):
        parse_gpus(text)


def test_the_peak_of_a_processor_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0, 3.5, 4.0, 5.0, 5.0, 6.0])
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: next(ticks))
    assert peak_here("cpu") == 2 * 1024**3 / 0.5
