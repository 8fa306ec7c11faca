"""The training loop of alignment and distillation, and distillation itself.

A run is a function of (student, teacher, corpus, settings): interrupted anywhere, it goes on from its last saved state
and repeats the uninterrupted run bit for bit (on the same machine with the same number of threads).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from thinkfast import records
from thinkfast.data.corpus import Batch, Corpus, Cursor, batches, epoch_batches
from thinkfast.distill.losses import FORWARD_KL, Loss, chunked_loss, prediction_mask
from thinkfast.distill.state import Counters, Identity, load_state, save_state
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder

COSINE, WSD = "cosine", "wsd"
WSD_DECAY = 0.2
CLIP = 1.0
SMOOTHING = 0.95
DIVERGED = 3.0

Progress = Callable[[int, int, int, float], None]
"""Called after every step with step, tokens seen, tokens in all, and the smoothed loss."""


class Diverged(Exception):
    """The loss or its gradient is no number any more, or has grown far above where it began. One line."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What fixes a run. `tokens` and `batch_tokens` count tokens (a batch with, a run without padding); `warmup` is a
    share of the tokens, `min_lr` a share of `lr`; `schedule` is "cosine" or "wsd" (constant, then linear decay over the
    last fifth); `save_every` counts steps; `row_tokens` is that of `batches`. Raises BadInput naming the field that is
    out of range."""

    tokens: int
    lr: float
    batch_tokens: int = 4096
    warmup: float = 0.05
    min_lr: float = 0.1
    weight_decay: float = 0.0
    schedule: str = COSINE
    seed: int = 0
    save_every: int = 100
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "lr", "batch_tokens", "save_every"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("warmup", "min_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")
        if self.weight_decay < 0:
            raise BadInput(f"weight_decay is {self.weight_decay}, expected at least 0")
        if self.schedule not in (COSINE, WSD):
            raise BadInput(f"schedule is {self.schedule!r}, expected {COSINE!r} or {WSD!r}")

    def lr_at(self, tokens: int) -> float:
        """The learning rate of the step that brings the run to `tokens`."""
        done = min(tokens / self.tokens, 1.0)
        if done < self.warmup:
            return self.lr * done / self.warmup
        if self.schedule == COSINE:
            through = (done - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 1.0
            share = 0.5 * (1 + math.cos(math.pi * through))
        else:
            share = min(1.0, (1 - done) / WSD_DECAY)
        return self.lr * (self.min_lr + (1 - self.min_lr) * share)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a finished run did; `loss` is smoothed over some twenty steps, `seconds` leaves out interruptions."""

    steps: int
    tokens: int
    loss: float
    seconds: float


def distill(
    teacher: Decoder,
    student: Decoder,
    corpus: Corpus,
    settings: TrainSettings,
    out_dir: Path,
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains all of `student`, in place, to give the teacher's next-token distribution on completion tokens.

    `loss` is the forward KL by default. Writes `metrics.jsonl` and `distill.state` into `out_dir` and goes on from the
    latter. Raises BadInput when the two models have different vocabularies or the corpus does not fit them, Diverged
    when training fails.
    """
    chosen = Loss(FORWARD_KL) if loss is None else loss
    check_vocabulary(teacher, student, corpus)

    def loss_of(batch: Batch) -> Tensor | None:
        mask = prediction_mask(batch.completion)
        count = int(mask.sum())
        if not count:
            return None
        return _batch_loss(chosen, teacher, student, batch, mask) / count

    identity: Identity = {"loss": chosen.kind, "beta": chosen.beta, "temperature": chosen.temperature}
    floor = math.log(student.config.vocab_size)
    every = student.parameters()
    return train("distill", student, every, loss_of, corpus, settings, out_dir, floor, identity, progress)


def evaluate_kl(teacher: Decoder, student: Decoder, corpus: Corpus, batch_tokens: int = 8192) -> float:
    """Mean KL(teacher || student) in nats over every completion token of `corpus`, usually a held-out slice."""
    check_vocabulary(teacher, student, corpus)
    total, count = 0.0, 0
    with torch.no_grad():
        for group in epoch_batches(corpus.lengths, 0, 0, batch_tokens):
            batch = corpus.collate(group).to(student.head_weight.device)
            mask = prediction_mask(batch.completion)
            total += float(_batch_loss(Loss(FORWARD_KL), teacher, student, batch, mask))
            count += int(mask.sum())
    return total / count


def _batch_loss(loss: Loss, teacher: Decoder, student: Decoder, batch: Batch, mask: Tensor) -> Tensor:
    """The loss summed over the positions of `mask`; the teacher is left alone. Right padding needs no mask: both models
    are causal, and no valid position comes after a padded one."""
    with torch.no_grad():
        taught = teacher.hidden(batch.input_ids)
    learned = student.hidden(batch.input_ids)
    return chunked_loss(loss, learned, student.head_weight, taught, teacher.head_weight, batch.input_ids, mask, count=1)


def check_vocabulary(teacher: Decoder, student: Decoder, corpus: Corpus) -> None:
    """Raises BadInput unless teacher, student and corpus speak of the same tokens."""
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise BadInput(f"the teacher has {sizes[0]} tokens and the student {sizes[1]}, expected the same vocabulary")
    if corpus.vocab_size > sizes[0]:
        raise BadInput(f"{corpus.path}: holds ids up to {corpus.vocab_size - 1}, the models have {sizes[0]} tokens")


def train(
    stage: str,
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Batch], Tensor | None],
    corpus: Corpus,
    settings: TrainSettings,
    out_dir: Path,
    floor: float,
    identity: Identity,
    progress: Progress | None = None,
) -> Trained:
    """Steps AdamW over `parameters` until `settings.tokens` were seen; `loss_of` gives a batch's loss, None to skip it.

    `floor` is a loss that is bad but natural at the start: training has diverged when the smoothed loss is three times
    above both it and the first loss. `identity` is what besides the settings and the corpus must not change on resume.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    state_path, metrics_path = out_dir / f"{stage}.state", out_dir / "metrics.jsonl"
    trainable = list(parameters)
    device = trainable[0].device
    optimizer = adamw(trainable, settings)
    fixed = {name: getattr(settings, name) for name in settings.__dataclass_fields__ if name != "save_every"}
    everything = {**fixed, **identity, "corpus": corpus.identity}
    counters = load_state(state_path, everything, model, optimizer) or Counters(Cursor(settings.seed))
    _drop_rows(metrics_path, stage, counters.step)
    stream = batches(corpus, counters.cursor, settings.batch_tokens, settings.row_tokens)
    mark, before = time.monotonic(), counters.seconds
    with metrics_path.open("a", encoding="utf-8") as metrics:
        while counters.tokens < settings.tokens:
            batch, cursor = next(stream)
            loss = loss_of(batch.to(device))
            if loss is None:
                counters = replace(counters, cursor=cursor)
                continue
            tokens = counters.tokens + batch.tokens
            lr = settings.lr_at(tokens)
            value, norm = float(loss.detach()), _gradient(loss, trainable, optimizer)
            smoothed = value if not counters.step else SMOOTHING * counters.loss + (1 - SMOOTHING) * value
            first = counters.first_loss if counters.step else value
            if not math.isfinite(value + norm) or smoothed > DIVERGED * max(first, floor):
                kept = f"{state_path} holds the last saved state" if state_path.exists() else "nothing was saved yet"
                raise Diverged(
                    f"{stage} diverged at step {counters.step + 1} (loss {value:.4g}, gradient norm {norm:.4g}, "
                    f"lr {lr:.3g}): {kept}"
                )
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            seconds = before + time.monotonic() - mark
            counters = Counters(cursor, counters.step + 1, tokens, seconds, first, smoothed)
            row = {"stage": stage, "step": counters.step, "tokens": tokens, "loss": value, "lr": lr, "grad_norm": norm}
            metrics.write(json.dumps(row | {"seconds": round(seconds, 3)}) + "\n")
            metrics.flush()
            if progress is not None:
                progress(counters.step, tokens, settings.tokens, smoothed)
            if counters.step % settings.save_every == 0 or tokens >= settings.tokens:
                save_state(state_path, everything, counters, model, optimizer)
    return Trained(counters.step, counters.tokens, counters.loss, counters.seconds)


def adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with weight decay on matrices alone: not on norms, biases, A_log, D and dt_bias."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=True)


def _gradient(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Fills the gradients, clips them, and returns their norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    return float(nn.utils.clip_grad_norm_(parameters, CLIP))


def _drop_rows(path: Path, stage: str, step: int) -> None:
    """Removes what a stage logged after `step`, and a last line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["stage"] != stage or row["step"] <= step:
            kept.append(line)
    records.write_text(path, "".join(kept))
