"""The training loop of every stage, and end-to-end distillation.

A run is a function of (student, teacher, corpus, settings): interrupted anywhere, it goes on from its last saved state
and repeats the uninterrupted run bit for bit (on the same machine with the same number of threads).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from thinkfast import ranks, records
from thinkfast.data.corpus import Batch, Corpus, Cursor, batches, epoch_batches
from thinkfast.distill import parallel
from thinkfast.distill.losses import FORWARD_KL, Loss, LossSchedule, chunked_loss, prediction_mask
from thinkfast.distill.state import Counters, Identity
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder

COSINE, WSD = "cosine", "wsd"
WSD_DECAY = 0.2
CLIP = 1.0
SMOOTHING = 0.95
DIVERGED = 3.0

Progress = Callable[[int, int, int, float], None]
"""Called after every step with step, tokens seen, tokens in all, and the smoothed loss."""
Row = dict[str, str | int | float]
Source = Callable[[Cursor], Iterator[tuple[Batch, Cursor]]]
"""Batches from a cursor on, each with the cursor that follows it: the n-th depends on the cursor alone."""


class Diverged(Exception):
    """The loss or its gradient is no number any more, or has grown far above where it began. One line."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What fixes a run. `tokens` and `batch_tokens` count tokens (a batch with, a run without padding); `warmup` is a
    share of the tokens, `min_lr` a share of `lr`; `schedule` is "cosine" or "wsd" (constant, then linear decay over the
    last fifth); a step takes `accumulate` batches; `save_every` counts steps; `row_tokens` is that of `batches`. Raises
    BadInput naming the field that is
    out of range."""

    tokens: int
    lr: float
    batch_tokens: int = 4096
    warmup: float = 0.05
    min_lr: float = 0.1
    weight_decay: float = 0.0
    schedule: str = COSINE
    seed: int = 0
    accumulate: int = 1
    save_every: int = 100
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "lr", "batch_tokens", "accumulate", "save_every"):
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


@dataclass(frozen=True)
class Task:
    """What a stage trains, and on what.

    `valid` counts what the loss of a batch is a sum over; `loss_of` gives that sum for a batch divided by the count of
    the whole step, after a share of the run's tokens. `floor` is a loss that is bad but natural at the start: training
    has diverged when the smoothed loss is three times above both it and the first loss. `identity` is what besides the
    settings must not change on resume.
    """

    stage: str
    model: nn.Module
    parameters: Iterable[nn.Parameter]
    source: Source
    valid: Callable[[Batch], int]
    loss_of: Callable[[Batch, int, float], Tensor]
    floor: float
    identity: Identity


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told of a run: `progress` and `log` after every step, `log` with its row of metrics.jsonl; `saved` after
    every saved state, with the stage and the step. None of them may change the run."""

    progress: Progress | None = None
    log: Callable[[Row], None] | None = None
    saved: Callable[[str, int], None] | None = None


SILENT = Watch()


def distill(
    teacher: Decoder,
    student: Decoder,
    corpus: Corpus,
    settings: TrainSettings,
    out_dir: Path,
    loss: Loss | LossSchedule | None = None,
    progress: Progress | None = None,
    watch: Watch = SILENT,
    stage: str = "distill",
    source: Source | None = None,
    extra: Identity | None = None,
) -> Trained:
    """Trains all of `student`, in place, to give the teacher's next-token distribution on completion tokens.

    `loss` is the forward KL by default; with the cross-entropy alone this is supervised fine-tuning, and the teacher is
    not run. `source` gives other batches than those of `corpus` in its order, with what fixes them in `extra`. Writes
    `metrics.jsonl` and `<stage>.state` into `out_dir` and goes on from the latter. Raises BadInput when the two models
    have different vocabularies or the corpus does not fit them, Diverged when training fails.
    """
    chosen = loss if isinstance(loss, LossSchedule) else LossSchedule(loss or Loss(FORWARD_KL))
    check_vocabulary(teacher, student, corpus)

    def loss_of(batch: Batch, count: int, share: float) -> Tensor:
        return batch_loss(chosen.at(share), teacher, student, batch, count)

    task = Task(
        stage,
        student,
        student.parameters(),
        source or corpus_source(corpus, settings),
        completion_count,
        loss_of,
        math.log(student.config.vocab_size),
        {**loss_identity(chosen), "corpus": corpus.identity, **(extra or {})},
    )
    return train(task, settings, out_dir, replace(watch, progress=progress or watch.progress))


def corpus_source(corpus: Corpus, settings: TrainSettings) -> Source:
    """The documents of a corpus, shuffled anew every epoch."""
    return partial(batches, corpus, batch_tokens=settings.batch_tokens, row_tokens=settings.row_tokens)


def completion_count(batch: Batch) -> int:
    """Positions of a batch that predict a completion token."""
    return int(prediction_mask(batch.completion).sum())


def loss_identity(schedule: LossSchedule) -> Identity:
    """What of a loss must not change on resume."""
    first, last = schedule.first, schedule.last
    names = [loss.kind if isinstance(loss.kind, str) else json.dumps(loss.kind) for loss in (first, last) if loss]
    identity: dict[str, str | int | float] = {"loss": " -> ".join(names), "beta": first.beta}
    if last is not None:
        identity["blend"] = str(list(schedule.blend))
    return identity | {"temperature": first.temperature, "alpha": first.alpha}


def evaluate_kl(teacher: Decoder, student: Decoder, corpus: Corpus, batch_tokens: int = 8192) -> float:
    """Mean KL(teacher || student) in nats over every completion token of `corpus`, usually a held-out slice."""
    check_vocabulary(teacher, student, corpus)
    total, count = 0.0, 0
    with torch.no_grad():
        for group in epoch_batches(corpus.lengths, 0, 0, batch_tokens):
            batch = corpus.collate(group).to(student.head_weight.device)
            total += float(ranks.current().call(partial(batch_loss, Loss(FORWARD_KL), teacher, student, batch, 1)))
            count += completion_count(batch)
    return total / count


def batch_loss(loss: Loss, teacher: Decoder, student: Decoder, batch: Batch, count: int) -> Tensor:
    """The loss summed over the batch's completion tokens and divided by `count`; the teacher is left alone. Right
    padding needs no mask: both models are causal, and no valid position comes after a padded one."""
    taught = None
    if loss.needs_teacher:
        with torch.no_grad():
            taught = teacher.hidden(batch.input_ids, bounds=batch.bounds)
    learned, mask = student.hidden(batch.input_ids, bounds=batch.bounds), prediction_mask(batch.completion)
    return chunked_loss(
        loss, learned, student.head_weight, taught, teacher.head_weight, batch.input_ids, mask, count=count
    )


def check_vocabulary(teacher: Decoder, student: Decoder, corpus: Corpus) -> None:
    """Raises BadInput unless teacher, student and corpus speak of the same tokens."""
    sizes = teacher.config.vocab_size, student.config.vocab_size
    if sizes[0] != sizes[1]:
        raise BadInput(f"the teacher has {sizes[0]} tokens and the student {sizes[1]}, expected the same vocabulary")
    if corpus.vocab_size > sizes[0]:
        raise BadInput(f"{corpus.path}: holds ids up to {corpus.vocab_size - 1}, the models have {sizes[0]} tokens")


def train(task: Task, settings: TrainSettings, out_dir: Path, watch: Watch = SILENT) -> Trained:
    """Steps AdamW over the task's parameters until `settings.tokens` were seen; batches without anything to learn are
    passed over. Raises Diverged, with the weights of the last saved state kept on disk and those in memory
    untouched."""
    out_dir.mkdir(parents=True, exist_ok=True)
    state_path, metrics_path = out_dir / f"{task.stage}.state", out_dir / "metrics.jsonl"
    run, team = _Run(task, settings), ranks.current()
    fixed = {name: getattr(settings, name) for name in settings.__dataclass_fields__ if name != "save_every"}
    everything = {**fixed, **task.identity}
    run.counters = parallel.load(team, state_path, everything, task.model, run.optimizer) or Counters(
        Cursor(settings.seed)
    )
    if team.rank:
        metrics_path = Path(os.devnull)
    else:
        _drop_rows(metrics_path, task.stage, run.counters.step)
    stream = task.source(run.counters.cursor)
    mark, before = time.monotonic(), run.counters.seconds
    with metrics_path.open("a", encoding="utf-8") as metrics:
        while run.counters.tokens < settings.tokens:
            value, norm = run.gradient(run.gather(stream))
            if run.diverged(value, norm):
                kept = f"{state_path} holds the last saved state" if state_path.exists() else "nothing was saved yet"
                raise Diverged(
                    f"{task.stage} diverged at step {run.counters.step + 1} (loss {value:.4g}, "
                    f"gradient norm {norm:.4g}, lr {run.lr:.3g}): {kept}"
                )
            run.step(value, before + time.monotonic() - mark)
            done = run.counters
            row: Row = {"stage": task.stage, "step": done.step, "tokens": done.tokens, "loss": value}
            row |= {"lr": run.lr, "grad_norm": norm, "seconds": round(done.seconds, 3)}
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            if watch.log is not None:
                watch.log(row)
            if watch.progress is not None:
                watch.progress(done.step, done.tokens, settings.tokens, done.loss)
            if done.step % settings.save_every == 0 or done.tokens >= settings.tokens:
                parallel.save(team, state_path, everything, done, task.model, run.optimizer)
                if watch.saved is not None:
                    watch.saved(task.stage, done.step)
    return Trained(run.counters.step, run.counters.tokens, run.counters.loss, run.counters.seconds)


@dataclass
class _Run:
    """One optimiser step in its parts: gather batches, gradient, check, step."""

    task: Task
    settings: TrainSettings
    counters: Counters = field(init=False)
    lr: float = 0.0

    def __post_init__(self) -> None:
        self.trainable = list(self.task.parameters)
        self.optimizer = adamw(self.trainable, self.settings)
        self._cursor: Cursor | None = None
        self._tokens = 0

    def gather(self, stream: Iterator[tuple[Batch, Cursor]]) -> list[Batch]:
        """The batches of the next step, those without anything to learn left out. Raises BadInput where a whole epoch
        has nothing else."""
        found: list[Batch] = []
        self._tokens = self.counters.tokens
        while len(found) < self.settings.accumulate:
            batch, self._cursor = next(stream)
            if self.task.valid(batch):
                found.append(batch)
                self._tokens += batch.tokens
            elif not found and self._cursor.epoch > self.counters.cursor.epoch + 1:
                raise BadInput(f"{self.task.stage}: no batch of an epoch has a token to learn that follows another one")
        return found

    def gradient(self, step: Sequence[Batch]) -> tuple[float, float]:
        """Fills the gradients of the whole step, clips them; returns the loss and the gradients' norm before clipping.

        The losses of the batches add up to a mean over everything that is valid in the step.
        """
        device = self.trainable[0].device
        count = sum(self.task.valid(batch) for batch in step)
        share = self._tokens / self.settings.tokens
        self.optimizer.zero_grad(set_to_none=True)
        team, value = ranks.current(), 0.0
        for batch, weight in team.deal(step):
            loss = team.call(partial(self.task.loss_of, batch.to(device), count, share)) * weight
            torch.autograd.backward(loss)
            value += float(loss.detach())
        self.lr = self.settings.lr_at(self._tokens)
        return team.total(value), parallel.norm_of(nn.utils.clip_grad_norm_(self.trainable, CLIP))

    def diverged(self, value: float, norm: float) -> bool:
        """Whether loss or gradient is no number, or the smoothed loss has grown far above where it began."""
        first = self.counters.first_loss if self.counters.step else value
        return not math.isfinite(value + norm) or self._smoothed(value) > DIVERGED * max(first, self.task.floor)

    def step(self, value: float, seconds: float) -> None:
        """Moves the weights and the counters."""
        if self._cursor is None:
            raise ValueError("a step without batches")
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        done = self.counters
        first = done.first_loss if done.step else value
        self.counters = Counters(self._cursor, done.step + 1, self._tokens, seconds, first, self._smoothed(value))

    def _smoothed(self, value: float) -> float:
        return SMOOTHING * self.counters.loss + (1 - SMOOTHING) * value if self.counters.step else value


def adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with weight decay on matrices alone: not on norms, biases, A_log, D and dt_bias."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), fused=True)


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
