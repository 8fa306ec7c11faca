"""Layer-wise alignment: every new mixer learns to give its teacher layer's output on the teacher's own inputs
(arXiv 2408.10189, sec. 3.2, on the mixer's output instead of the block's). One pass of the teacher serves all layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from thinkfast.data.corpus import Batch, Corpus, epoch_batches
from thinkfast.distill.trainer import Progress, TrainSettings, check_vocabulary, train
from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, MAMBA
from thinkfast.model.decoder import Decoder
from thinkfast.student.convert import blocks

EVALUATED_BATCHES = 8


def align(
    teacher: Decoder,
    student: Decoder,
    corpus: Corpus,
    settings: TrainSettings,
    out_dir: Path,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Trains the mixers of the student's Mamba layers, in place, and nothing else; returns `layer_errors` afterwards.

    Prompt and completion tokens count alike: a state is built from both. Writes `metrics.jsonl` and `align.state` into
    `out_dir` and goes on from the latter. Raises BadInput when the student was not made from a teacher of this shape,
    Diverged when training fails.
    """
    students = blocks(student)
    mixers = nn.ModuleList(students[index].mixer for index in replaced_layers(teacher, student))
    check_vocabulary(teacher, student, corpus)

    def loss_of(batch: Batch) -> Tensor:
        return torch.stack(list(mixer_errors(teacher, student, batch).values())).mean()

    train("align", student, mixers.parameters(), loss_of, corpus, settings, out_dir, 1.0, {}, progress)
    return layer_errors(teacher, student, corpus, settings.batch_tokens)


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


def mixer_errors(teacher: Decoder, student: Decoder, batch: Batch) -> dict[int, Tensor]:
    """Layer -> |student - teacher|^2 / |teacher|^2 of the mixer's output, both summed over the batch's real tokens."""
    layers = replaced_layers(teacher, student)
    real = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device) < batch.lengths[:, None]
    errors: dict[int, Tensor] = {}
    with torch.no_grad():
        x = teacher.embed_tokens(batch.input_ids)
    for index, (old, new) in enumerate(zip(blocks(teacher), blocks(student), strict=True)):
        with torch.no_grad():
            u = old.input_layernorm(x)
            target = old.mix(u)
            x = x + target
            x = x + old.mlp(old.post_attention_layernorm(x))
        if index in layers:
            wanted = target[real]
            difference = new.mix(u)[real] - wanted
            errors[index] = difference.float().pow(2).sum() / wanted.float().pow(2).sum()
        if index == layers[-1]:
            break
    return errors


def layer_errors(teacher: Decoder, student: Decoder, corpus: Corpus, batch_tokens: int = 4096) -> dict[int, float]:
    """Layer -> relative squared error of the mixer's output, averaged over at most eight batches of `corpus`."""
    groups = epoch_batches(corpus.lengths, 0, 0, batch_tokens)[:EVALUATED_BATCHES]
    device = student.head_weight.device
    with torch.no_grad():
        found = [mixer_errors(teacher, student, corpus.collate(group).to(device)) for group in groups]
    return {index: sum(float(errors[index]) for errors in found) / len(found) for index in found[0]}
