"""Defects found in published code that touch training or weight maps, and the test here that would catch each.

* Grouped keys and values repeated by rows instead of head blocks
  -> tests/student/test_convert.py::test_rows_are_q_k_v_of_each_head_and_grouped_heads_follow_repeat_kv
* Mamba-1 heads repeated in groups of 16 channels, so that queries meet another head's keys
  -> tests/model/test_mixers.py::test_at_the_start_it_is_linear_attention_with_the_heads_of_attention
  -> tests/model/test_mamba1.py::test_equals_the_definition
* Discrete Mamba-2: prefill and single steps with different decays
  -> tests/model/test_mixers.py::test_states_go_on_after_a_prefill
* Discrete Mamba-2: memory of a prefill grows with the square of its length
  -> tests/distill/test_peers.py::test_memory_grows_with_the_length
* The convolution of one document reaches into the next
  -> tests/distill/test_peers.py::test_documents_of_a_batch_do_not_see_each_other
  -> tests/distill/test_peers.py::test_a_packed_batch_teaches_what_its_documents_alone_do
  -> tests/model/test_packing.py::test_a_packed_row_is_its_documents_alone
  -> tests/data/test_leaks.py::test_packed_documents_do_not_know_each_other
* Discrete Mamba-2: x divided by a decay near zero
  -> tests/model/test_mixers.py::test_extreme_decays_stay_finite_in_bfloat16
* Clipping commented out; a batch lost at the start
  -> tests/distill/test_peers.py::test_gradients_are_clipped_and_every_document_comes_once_an_epoch
* Mixers with another number of heads than the attention whose matrix they are to learn
  -> tests/distill/test_peers.py::test_mixers_have_the_heads_of_their_teacher
* Attention initialisation that addresses modules which do not exist
  -> tests/student/test_convert.py::test_rows_are_q_k_v_of_each_head_and_grouped_heads_follow_repeat_kv
* Temperature on the student alone; prompt tokens in the loss
  -> tests/distill/test_losses.py::test_both_paths_equal_the_definition_in_value_and_gradient
  -> tests/distill/test_losses.py::test_prompt_and_padding_give_no_gradient_and_the_first_completion_token_counts
* A divergence that grows with the length of the text; padding counted
  -> tests/distill/test_losses.py::test_padding_and_splitting_change_nothing
* The mask of unshifted labels
  -> tests/distill/test_losses.py::test_next_tokens_shift_by_one
  -> tests/distill/test_losses.py::test_prompt_and_padding_give_no_gradient_and_the_first_completion_token_counts
* Frequency scaling dropped in the attention layers that are kept
  -> tests/distill/test_peers.py::test_kept_layers_are_the_teachers_with_scaled_frequencies
* A smaller student vocabulary filled up with zeros
  -> tests/distill/test_losses.py::test_unequal_vocabularies_are_refused
  -> tests/distill/test_trainer.py::test_different_vocabularies_are_refused
* Keys mangled on loading, hidden by a load that is not strict; rates by substrings of names
  -> tests/model/test_checkpoint.py::test_every_missing_unexpected_and_misshapen_tensor_is_named
  -> tests/distill/test_trainer.py::test_weight_decay_spares_vectors
* A layer ranking read from a tracker by a display name
  -> tests/test_students.py::test_layers_are_ranked_and_a_student_reads_it
* Resume by replaying batches; the teacher saved with the student; losses summed in half precision
  -> tests/distill/test_trainer.py::test_kill_9_and_resume_equals_the_uninterrupted_run
  -> tests/distill/test_peers.py::test_a_saved_state_holds_the_student_alone
  -> tests/distill/test_losses.py::test_a_wide_vocabulary_in_bfloat16_is_near_the_exact_gradient
  -> tests/data/test_corpus.py::test_two_epochs_give_every_document_twice
* Prompts or ends masked wrongly where the pad token is the end token, or there is none
  -> tests/distill/test_refusals.py::test_a_missing_pad_token_is_told_and_does_no_harm
* A checkpoint that cannot be loaded while the run goes on
  -> tests/test_students.py::test_divergence_keeps_the_model_of_the_last_save
* Tokens a second against the time since 1970
  -> tests/test_students.py::test_the_rate_is_tokens_over_the_seconds_since_this_process_began
* A gated norm over all groups at once
  -> tests/model/test_mamba2.py::test_equals_the_definition
* Tensors of an exported student that readers leave out without a word
  -> tests/model/test_parity.py::test_what_we_save_the_stock_class_computes
* Data that is read again, or lost, when its preparation is interrupted
  -> tests/data/test_writer.py::test_stopped_at_any_document_or_step_it_goes_on_to_the_same_bytes
* A target of the last layer taken behind the final norm
  -> tests/distill/test_align.py::test_the_block_term_compares_what_a_block_adds_the_last_one_before_the_final_norm
* Half the gradient lost, or doubled, when a step is cut into several batches
  -> tests/distill/test_peers.py::test_accumulated_batches_are_one_large_batch
"""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from thinkfast.data.corpus import Batch, Cursor, batches
from thinkfast.distill import trainer
from thinkfast.distill.losses import Loss
from thinkfast.distill.trainer import Task, TrainSettings, batch_loss, completion_count, distill, train
from thinkfast.model.config import ATTENTION, DecoderConfig, RopeScaling
from thinkfast.model.decoder import Decoder
from thinkfast.model.mixers import MIXERS
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan

ROOT = Path(__file__).parents[2]


def test_every_test_of_the_list_exists():
    named = re.findall(r"-> (tests/[\w/]+\.py)::(test_\w+)", __doc__)
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that was made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max(self.size, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)), 0)
        return out


@pytest.mark.parametrize("kind", list(MIXERS))
def test_memory_grows_with_the_length(teacher, kind):
    mixer, sizes = convert(teacher, LayerPlan(mixer=kind)).layers[0].mixer, []
    for length in (256, 512):
        with torch.no_grad(), Largest() as largest:
            mixer(torch.randn(1, length, 16))
        sizes.append(largest.size)
    assert sizes[1] <= 2.2 * sizes[0]


@pytest.mark.parametrize("kind", list(MIXERS))
def test_documents_of_a_batch_do_not_see_each_other(teacher, kind):
    student = convert(teacher, LayerPlan((1,), mixer=kind))
    ids = torch.randint(0, 24, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = student(ids)
        for row in range(3):
            assert torch.allclose(student(ids[row : row + 1, :15]), together[row, :15], atol=1e-4)


@pytest.mark.parametrize("loss", [Loss("cross_entropy"), Loss({"forward_kl": 1.0, "cross_entropy": 0.5})])
@pytest.mark.parametrize("kind", list(MIXERS))
def test_a_packed_batch_teaches_what_its_documents_alone_do(teacher, corpus, kind, loss):
    student = convert(teacher, LayerPlan((1,), mixer=kind), seed=3)
    batch, _ = next(batches(corpus, Cursor(0), 200, packed=True))
    count = completion_count(batch)
    value = batch_loss(loss, teacher, student, batch, count)
    value.backward()
    found = torch.cat([p.grad.flatten() for p in student.parameters()])
    student.zero_grad()
    total, counted = 0.0, 0
    for start, end in pairwise(batch.bounds.tolist()):
        alone = Batch(batch.input_ids[:, start:end], batch.completion[:, start:end], torch.tensor([end - start]))
        part = batch_loss(loss, teacher, student, alone, count)
        part.backward()
        total, counted = total + float(part.detach()), counted + completion_count(alone)
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert len(batch.bounds) > 4
    assert counted == count
    assert float(value.detach()) == pytest.approx(total, rel=1e-5)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_gradients_are_clipped_and_every_document_comes_once_an_epoch(teacher, student, corpus, tmp_path, monkeypatch):
    seen, norms = Counter(), []
    honest = trainer._Run.step

    def step(run, value, seconds):
        norms.append(float(torch.cat([p.grad.flatten() for p in run.trainable if p.grad is not None]).norm()))
        honest(run, value, seconds)

    monkeypatch.setattr(trainer._Run, "step", step)

    def loss_of(batch, count, share):
        for row, length in zip(batch.input_ids, batch.lengths, strict=True):
            seen[tuple(row[:length].tolist())] += 1
        return 50 * batch_loss(Loss(), teacher, student, batch, count)

    settings = TrainSettings(tokens=corpus.tokens, lr=1e-3, batch_tokens=256)
    source = trainer.corpus_source(corpus, settings)
    task = Task("clipped", student, student.parameters(), source, completion_count, loss_of, 1e9, {})
    train(task, settings, tmp_path)
    documents = [tuple(prompt + completion) for prompt, completion in map(corpus.document, range(len(corpus)))]
    assert seen == Counter(documents)
    assert max(norms) <= 1 + 1e-4


@pytest.mark.parametrize("kind", list(MIXERS))
def test_mixers_have_the_heads_of_their_teacher(kind):
    teacher = DecoderConfig(53, 48, 44, 6, 2, 16, (ATTENTION,) * 2)
    shape = LayerPlan(mixer=kind).student_config(teacher).mamba
    assert (shape.n_heads, shape.head_dim) == (6, 16)


def test_kept_layers_are_the_teachers_with_scaled_frequencies(teacher):
    scaling = RopeScaling(8.0, 1.0, 4.0, 32)
    scaled = Decoder(replace(teacher.config, rope_scaling=scaling)).eval()
    scaled.load_state_dict(teacher.state_dict())
    kept = convert(scaled, LayerPlan((1,))).layers[1]
    u = torch.randn(1, 60, 16)
    with torch.no_grad():
        assert torch.equal(kept.mixer(u), scaled.layers[1].mixer(u))
        assert not torch.allclose(kept.mixer(u), teacher.layers[1].mixer(u), atol=1e-4)


def test_a_saved_state_holds_the_student_alone(teacher, student, corpus, tmp_path):
    distill(teacher, student, corpus, TrainSettings(tokens=500, lr=1e-3, batch_tokens=256), tmp_path)
    saved = torch.load(tmp_path / "distill.state", weights_only=True)
    assert saved["model"].keys() == student.state_dict().keys()
    numbers = sum(t.numel() for t in saved["model"].values())
    assert (tmp_path / "distill.state").stat().st_size < 3.5 * 4 * numbers + 100_000


def test_accumulated_batches_are_one_large_batch(teacher, corpus):
    settings = TrainSettings(tokens=10_000, lr=1e-3, batch_tokens=128, accumulate=4)
    student = convert(teacher, LayerPlan((1,)), seed=3)
    stream = batches(corpus, Cursor(0), 128)
    step = [next(stream)[0] for _ in range(4)]
    count = sum(map(completion_count, step))
    # The mean over every completion token, document by document, without padding.
    for batch in step:
        for ids, mask, length in zip(batch.input_ids, batch.completion, batch.lengths, strict=True):
            alone = Batch(ids[None, :length], mask[None, :length], length[None])
            (batch_loss(Loss(), teacher, student, alone, 1) / count).backward()
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    source = trainer.corpus_source(corpus, settings)

    def loss_of(batch, n, share):
        return batch_loss(Loss(), teacher, student, batch, n)

    task = Task("a", student, student.parameters(), source, completion_count, loss_of, 1.0, {})
    run = trainer._Run(task, settings)
    run.counters = trainer.Counters(Cursor(0))
    _, norm = run.gradient(run.gather(batches(corpus, Cursor(0), 128)))
    found = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert norm == pytest.approx(float(wanted.norm()), rel=1e-4)
    assert (found * max(1.0, norm) - wanted).norm() < 1e-4 * wanted.norm()
