import json
from functools import partial

import numpy as np
import pytest
import torch

from thinkfast.distill.align import (
    AlignLoss,
    align,
    attention_matrix,
    layer_errors,
    matrix_errors,
    mixer_errors,
    orient,
    output_errors,
    replaced_layers,
)
from thinkfast.distill.trainer import TrainSettings
from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan


def remember(inputs, index, module, given, output):
    inputs[index] = (given[0], output)


def test_errors_are_relative_and_over_real_tokens_alone(teacher, student, corpus):
    batch = corpus.collate(np.array([0, 7, 9]))
    found = mixer_errors(teacher, student, batch)
    inputs = {}
    for index in (0, 2):
        hook = partial(remember, inputs, index)
        teacher.layers[index].mixer.register_forward_hook(hook)
    teacher(batch.input_ids)
    for index, (u, target) in inputs.items():
        output = student.layers[index].mixer(u)
        above = sum(
            (output[row, t] - target[row, t]).pow(2).sum()
            for row, length in enumerate(batch.lengths.tolist())
            for t in range(length)
        )
        below = sum(
            target[row, t].pow(2).sum() for row, length in enumerate(batch.lengths.tolist()) for t in range(length)
        )
        assert found[index].item() == pytest.approx((above / below).item(), rel=1e-5)
    assert found.keys() == inputs.keys()


def test_errors_do_not_depend_on_padding(teacher, student, corpus):
    batch = corpus.collate(np.array([3]))
    wider = corpus.collate(np.array([3, int(corpus.lengths.argmax())]))
    only_first = type(wider)(wider.input_ids[:1], wider.completion[:1], wider.lengths[:1])
    assert wider.input_ids.shape[1] > batch.input_ids.shape[1]
    for index, error in mixer_errors(teacher, student, batch).items():
        assert mixer_errors(teacher, student, only_first)[index].item() == pytest.approx(error.item(), rel=1e-5)


def test_align_reduces_every_error_and_trains_nothing_else(teacher, student, corpus, tmp_path):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    taught = {name: value.clone() for name, value in teacher.state_dict().items()}
    errors = layer_errors(teacher, student, corpus)
    settings = TrainSettings(tokens=10_000, lr=1e-2, batch_tokens=256)
    after = align(teacher, student, corpus, settings, tmp_path / "out")
    assert after.keys() == errors.keys() == {0, 2}
    for index in errors:
        assert after[index] < 0.7 * errors[index]
    for name, value in student.state_dict().items():
        mixer = name.startswith(("layers.0.mixer", "layers.2.mixer"))
        assert torch.equal(value, before[name]) != mixer, name
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, taught[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"align"}
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_layers_learn_independently(teacher, corpus, tmp_path):
    """Gradients of a layer must not depend on which other layers are replaced."""
    batch = corpus.collate(np.array([1, 2]))
    both = convert(teacher, LayerPlan((1,)), seed=3)
    torch.stack(list(mixer_errors(teacher, both, batch).values())).sum().backward()
    one = convert(teacher, LayerPlan((0, 1)), seed=3)
    one.layers[2].mixer.load_state_dict(both.layers[2].mixer.state_dict())
    mixer_errors(teacher, one, batch)[2].backward()
    for mine, theirs in zip(both.layers[2].mixer.parameters(), one.layers[2].mixer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_student_without_new_layers_is_refused(teacher):
    with pytest.raises(BadInput, match="replaces no attention layer"):
        replaced_layers(teacher, convert(teacher, LayerPlan((0, 1, 2))))


def test_a_student_of_another_depth_is_refused(teacher):
    other = Decoder(DecoderConfig(24, 16, 24, 2, 1, 8, (ATTENTION,) * 2))
    with pytest.raises(BadInput, match="the teacher has 3 layers of width 16, the student 2 of width 16"):
        replaced_layers(teacher, other)


def hidden_states(model, input_ids):
    """What goes into each block, and what comes out of the last one before the final norm."""
    states, x = [model.embed_tokens(input_ids)], model.embed_tokens(input_ids)
    for layer in model.layers:
        x = layer(x)
        states.append(x)
    return states


def test_the_block_term_compares_what_a_block_adds_the_last_one_before_the_final_norm(teacher, corpus):
    student = convert(teacher, LayerPlan((1,)), seed=2)
    batch = corpus.collate(np.array([5]))
    found = output_errors(teacher, student, batch, AlignLoss(mixer=0.0, block=2.0))
    states = hidden_states(teacher, batch.input_ids)
    for index in (0, 2):
        wanted = states[index + 1] - states[index]
        made = student.layers[index](states[index]) - states[index]
        expected = 2 * (made - wanted).pow(2).sum() / wanted.pow(2).sum()
        assert found[index].item() == pytest.approx(expected.item(), rel=1e-4)
    both = output_errors(teacher, student, batch, AlignLoss(mixer=1.0, block=2.0))
    alone = mixer_errors(teacher, student, batch)
    for index in (0, 2):
        assert both[index].item() == pytest.approx((found[index] + alone[index]).item(), rel=1e-5)
    # The final norm has no say: what it does to the state is no part of the target.
    teacher.norm.weight.data.mul_(7)
    assert torch.equal(output_errors(teacher, student, batch, AlignLoss(0.0, 2.0))[2], found[2])


def test_weights_of_alignment_are_checked():
    for weights in ((0.0, 0.0), (-1.0, 2.0)):
        with pytest.raises(BadInput, match="expected one above 0, none below"):
            AlignLoss(*weights)


def test_the_attention_matrix_is_that_of_the_layer(teacher):
    attention = teacher.layers[1].mixer
    u = torch.randn(2, 7, 16)
    matrix = attention_matrix(attention, u)
    assert torch.allclose(matrix.sum(-1), torch.ones(2, 2, 7))
    values = attention.v_proj(u).view(2, 7, 1, 8).expand(2, 7, 2, 8)
    read = torch.einsum("bhts,bshp->bthp", matrix, values).flatten(2)
    assert torch.allclose(attention.o_proj(read), attention(u), atol=1e-5)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete"])
def test_matrices_learn_the_attention_matrix_and_nothing_else_moves(teacher, corpus, tmp_path, mixer):
    student = convert(teacher, LayerPlan((1,), mixer=mixer), torch.arange(96).view(4, 24) % 24)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    batch = corpus.collate(np.arange(8))
    start = matrix_errors(teacher, student, batch, 16)
    settings = TrainSettings(tokens=10_000, lr=1e-2, batch_tokens=256)
    after = orient(teacher, student, corpus, settings, tmp_path, length=16)
    assert after.keys() == {0, 2}
    for index, error in matrix_errors(teacher, student, batch, 16).items():
        assert error < 0.8 * start[index]
    for name, value in student.state_dict().items():
        if not name.startswith(("layers.0.mixer", "layers.2.mixer")):
            assert torch.equal(value, before[name]), name


def test_rows_behind_a_gated_norm_are_compared_in_direction(teacher, corpus):
    student = convert(teacher, LayerPlan((0, 1)))
    batch = corpus.collate(np.array([1]))
    mixer = student.layers[2].mixer
    before = matrix_errors(teacher, student, batch, 99)[2]
    scale = torch.rand(1, 1, int(batch.lengths[0]), 1) + 0.5
    whole = mixer.matrix
    mixer.matrix = lambda u: scale * whole(u)
    assert matrix_errors(teacher, student, batch, 99)[2].item() == pytest.approx(before.item(), rel=1e-5)


def test_a_mixer_without_a_matrix_is_refused_before_any_work(teacher, corpus, tmp_path):
    student = convert(teacher, LayerPlan(mixer="mamba1"))
    with pytest.raises(BadInput, match="Mamba-1 has no mixer matrix a head"):
        orient(teacher, student, corpus, TrainSettings(tokens=10, lr=1.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()
