"""Layer-wise stages: every new mixer learns from its teacher layer, on the teacher's own inputs, all layers in one
pass of the teacher (arXiv 2408.10189, sec. 3).

`matrices` compares what the recurrence multiplies its values by with the attention matrix; `align` compares outputs, of
the mixer, of the whole block before the next norm (the last block's before the final one), or both. Either trains the
mixers alone, and every mixer for itself: a student aligned in all layers serves any choice of attention layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from thinkfast import ranks
from thinkfast.data.corpus import Batch, Corpus, epoch_batches
from thinkfast.distill.state import Identity
from thinkfast.distill.trainer import (
    SILENT,
    Progress,
    Task,
    TrainSettings,
    Watch,
    check_vocabulary,
    corpus_source,
    train,
)
from thinkfast.errors import BadInput
from thinkfast.model.attention import Attention
from thinkfast.model.config import ATTENTION, MAMBA
from thinkfast.model.decoder import Block, Decoder
from thinkfast.model.mixer import StateMixer
from thinkfast.student.convert import blocks

EVALUATED_BATCHES = 8
Errors = dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class AlignLoss:
    """How much the errors of the mixer's and of the whole block's output count. Raises BadInput unless one does."""

    mixer: float = 1.0
    block: float = 0.0

    def __post_init__(self) -> None:
        if min(self.mixer, self.block) < 0 or not self.mixer + self.block > 0:
            raise BadInput(
                f"align has weights mixer {self.mixer} and block {self.block}, expected one above 0, none below"
            )


def align(
    teacher: Decoder,
    student: Decoder,
    corpus: Corpus,
    settings: TrainSettings,
    out_dir: Path,
    progress: Progress | None = None,
    loss: AlignLoss | None = None,
    watch: Watch = SILENT,
) -> dict[int, float]:
    """Trains the mixers of the student's Mamba layers, in place, and nothing else; returns `layer_errors` afterwards.

    Prompt and completion tokens count alike: a state is built from both. Writes `metrics.jsonl` and `align.state` into
    `out_dir` and goes on from the latter. Raises BadInput when the student was not made from a teacher of this shape,
    Diverged when training fails.
    """
    chosen = loss or AlignLoss()

    def errors(batch: Batch) -> Errors:
        return output_errors(teacher, student, batch, chosen)

    identity = {"mixer": chosen.mixer, "block": chosen.block}
    _train_mixers("align", teacher, student, corpus, settings, out_dir, errors, identity, progress, watch)
    return layer_errors(teacher, student, corpus, settings.batch_tokens)


def orient(
    teacher: Decoder,
    student: Decoder,
    corpus: Corpus,
    settings: TrainSettings,
    out_dir: Path,
    length: int = 256,
    progress: Progress | None = None,
    watch: Watch = SILENT,
) -> dict[int, float]:
    """The stage `matrices`: as `align`, on the matrices of the first `length` tokens of each document; returns the last
    errors on at most eight batches. Raises BadInput also for a mixer that has no matrix a head."""

    def errors(batch: Batch) -> Errors:
        return matrix_errors(teacher, student, batch, length)

    nothing = torch.zeros(1, 1, student.config.hidden_size, device=student.head_weight.device)
    for index in replaced_layers(teacher, student):
        ranks.current().call(partial(_state_mixer(blocks(student)[index]).matrix, nothing))
    _train_mixers("matrices", teacher, student, corpus, settings, out_dir, errors, {"length": length}, progress, watch)
    return _evaluated(errors, student, corpus, settings.batch_tokens)


def _train_mixers(
    stage: str,
    teacher: Decoder,
    student: Decoder,
    corpus: Corpus,
    settings: TrainSettings,
    out_dir: Path,
    errors: Callable[[Batch], Errors],
    identity: dict[str, float],
    progress: Progress | None,
    watch: Watch,
) -> None:
    students = blocks(student)
    mixers = nn.ModuleList(students[index].mixer for index in replaced_layers(teacher, student))
    check_vocabulary(teacher, student, corpus)

    def loss_of(batch: Batch, count: int, share: float) -> Tensor:
        # Relative errors are means already: a batch counts by its share of the step's tokens.
        return torch.stack(list(errors(batch).values())).mean() * (batch.tokens / count)

    source = corpus_source(corpus, settings)
    fixed: Identity = {**identity, "corpus": corpus.identity}
    task = Task(stage, student, mixers.parameters(), source, _tokens, loss_of, 1.0, fixed)
    train(task, settings, out_dir, replace(watch, progress=progress or watch.progress))


def _tokens(batch: Batch) -> int:
    return batch.tokens


def replaced_layers(teacher: Decoder, student: Decoder) -> list[int]:
    """Layers that are attention in the teacher and Mamba in the student. Raises BadInput when there is none or the two
    differ in depth or width."""
    old, new = teacher.config, student.config
    if (old.num_layers, old.hidden_size) != (new.num_layers, new.hidden_size):
        raise BadInput(
            f"the teacher has {old.num_layers} layers of width {old.hidden_size}, "
            f"the student {new.num_layers} of width {new.hidden_size}, expected the same"
        )
    pairs = enumerate(zip(old.layer_types, new.layer_types, strict=True))
    replaced = [index for index, (before, after) in pairs if before == ATTENTION and after == MAMBA]
    if not replaced:
        raise BadInput("the student replaces no attention layer of the teacher, so there is nothing to align")
    return replaced


def mixer_errors(teacher: Decoder, student: Decoder, batch: Batch) -> Errors:
    """Layer -> |student - teacher|^2 / |teacher|^2 of the mixer's output, both summed over the batch's real tokens."""
    return output_errors(teacher, student, batch, AlignLoss())


def output_errors(teacher: Decoder, student: Decoder, batch: Batch, loss: AlignLoss) -> Errors:
    """Layer -> the weighted sum of the relative squared errors of the mixer's and of the block's output. What a block
    adds to its input is compared, so that the residual stream does not hide it; the MLP behind is the student's
    copy."""
    real = _real(batch)
    errors: Errors = {}
    for index, old, x, u, target in _teacher_inputs(teacher, student, batch):
        new = blocks(student)[index]
        made, error = new.mix(u), torch.zeros((), device=u.device)
        if loss.mixer:
            error = error + loss.mixer * _relative(made[real], target[real])
        if loss.block:
            with torch.no_grad():
                wanted = target + old.mlp(old.post_attention_layernorm(x + target))
            added = made + new.mlp(new.post_attention_layernorm(x + made))
            error = error + loss.block * _relative(added[real], wanted[real])
        errors[index] = error
    return errors


def matrix_errors(teacher: Decoder, student: Decoder, batch: Batch, length: int) -> Errors:
    """Layer -> |T - A|^2 / |A|^2 over the rows of real tokens, for the mixer's matrix T and the attention matrix A
    (arXiv 2408.10189, eq. 4, squared and relative). A gated norm divides the scale of each row out, so behind one the
    rows are compared in direction: both are scaled to length 1."""
    errors: Errors = {}
    real = _real(batch)[:, :length]
    for index, old, _, u, _ in _teacher_inputs(teacher, student, batch):
        mixer = _state_mixer(blocks(student)[index])
        if not isinstance(old.mixer, Attention):
            raise ValueError(f"layer {index} of the teacher has no attention")
        wanted = attention_matrix(old.mixer, u[:, :length]).transpose(1, 2)[real]
        made = mixer.matrix(u[:, :length]).transpose(1, 2)[real]
        if mixer.normed:
            made, wanted = (nn.functional.normalize(rows, dim=-1, eps=1e-8) for rows in (made, wanted))
        errors[index] = _relative(made, wanted)
    return errors


@torch.no_grad()
def attention_matrix(attention: Attention, u: Tensor) -> Tensor:
    """`Attention.matrix` without a gradient."""
    return attention.matrix(u)


Inputs = tuple[int, Block, Tensor, Tensor, Tensor]


def _teacher_inputs(teacher: Decoder, student: Decoder, batch: Batch) -> Iterator[Inputs]:
    """Of every replaced layer: index, the teacher's block, its input x (B, L, D), that of its mixer, and what it
    gives."""
    layers = replaced_layers(teacher, student)
    with torch.no_grad():
        x = teacher.embed_tokens(batch.input_ids)
    for index, old in enumerate(blocks(teacher)):
        with torch.no_grad():
            u = old.input_layernorm(x)
            target = old.mix(u)
        if index in layers:
            yield index, old, x, u, target
        if index == layers[-1]:
            return
        with torch.no_grad():
            x = x + target
            x = x + old.mlp(old.post_attention_layernorm(x))


def _relative(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).float().pow(2).sum() / wanted.float().pow(2).sum()


def _real(batch: Batch) -> Tensor:
    return torch.arange(batch.input_ids.shape[1], device=batch.lengths.device) < batch.lengths[:, None]


def _state_mixer(block: Block) -> StateMixer:
    if not isinstance(block.mixer, StateMixer):
        raise ValueError("an attention layer has no mixer to train")
    return block.mixer


def layer_errors(teacher: Decoder, student: Decoder, corpus: Corpus, batch_tokens: int = 4096) -> dict[int, float]:
    """Layer -> relative squared error of the mixer's output, averaged over at most eight batches of `corpus`."""

    def errors(batch: Batch) -> Errors:
        return mixer_errors(teacher, student, batch)

    return _evaluated(errors, student, corpus, batch_tokens)


def _evaluated(
    errors: Callable[[Batch], Errors], student: Decoder, corpus: Corpus, batch_tokens: int
) -> dict[int, float]:
    groups = epoch_batches(corpus.lengths, 0, 0, batch_tokens)[:EVALUATED_BATCHES]
    device = student.head_weight.device
    with torch.no_grad():
        found = [ranks.current().call(partial(errors, corpus.collate(group).to(device))) for group in groups]
    return {index: sum(float(part[index]) for part in found) / len(found) for index in found[0]}
