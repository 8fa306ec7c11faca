"""A verifier of one's own: any decoder with a head that tells where a solution went wrong, trained on graded samples.

The score of a completion is the log-probability that nothing went wrong in it,

    S = alpha * sum of log p(token) + sum over step ends of log sigmoid(head(state)),

so that it starts as the summed log-probability times alpha and a step's score is what it adds. Three terms teach it:
the right samples are made likelier, as in rejection-sampling fine-tuning, which turns the decoder into one that
recognises them (arXiv 2402.06457); right and wrong samples of one problem are compared in pairs (arXiv 2203.02155,
eq. 1), so that nothing is gained from telling hard problems from easy ones; and steps may have labels by roll-out
(arXiv 2312.08935).
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from thinkfast import progress, records
from thinkfast.data.tokenizer import Tokenizer, load_tokenizer
from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.decoder import Decoder

HEAD, NOTE, STATE = "verifier.safetensors", "verifier.json", "verifier.state"
SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class VerifierSettings:
    """steps: updates, each on about `batch_tokens` tokens of a few problems. text_weight, pair_weight, step_weight: of
    the likelihood of right samples, of pairs and of step labels. frozen: only the head learns."""

    steps: int = 500
    batch_tokens: int = 4_000
    lr: float = 4e-4
    text_weight: float = 1.0
    pair_weight: float = 1.0
    step_weight: float = 0.5
    frozen: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """A graded completion. labels: for every step end the share of continuations that came out right, or None.
    logprob: what its sampler gave it, where known."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    correct: bool
    labels: tuple[float, ...] | None = None
    logprob: float = 0.0


class Scores(NamedTuple):
    """total (B,): S. running (B, L): S up to and with every token. at_end (B, L): where a step ends. likelihood (B,):
    the sum of log p(token) over the answer."""

    total: Tensor
    running: Tensor
    at_end: Tensor
    likelihood: Tensor


class Verifier(nn.Module):
    """The decoder and the head. `ends`: for every token id, whether it ends a step (holds a line end)."""

    def __init__(self, decoder: Decoder, ends: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = nn.Linear(decoder.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, 3.0)
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("ends", ends, persistent=False)
        self.ends: Tensor

    def forward(self, ids: Tensor, prompt: Tensor, length: Tensor) -> Scores:
        """ids (B, L), of which row b has `length[b]` tokens, the first `prompt[b]` of them the prompt."""
        hidden = self.decoder.hidden(ids)
        place = torch.arange(ids.shape[1], device=ids.device)[None, :]
        inside = (place >= prompt[:, None]) & (place < length[:, None])
        logits = F.linear(hidden[:, :-1], self.decoder.head_weight)
        chosen = F.pad(-F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), (1, 0))
        at_end = inside & (self.ends[ids] | (place == length[:, None] - 1))
        sound = F.logsigmoid(self.head(hidden)[..., 0])
        chosen = torch.where(inside, chosen, 0.0)
        running = (self.alpha * chosen + torch.where(at_end, sound, 0.0)).cumsum(1)
        return Scores(running[:, -1], running, at_end, chosen.sum(1))


def step_ends(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """For every token id whether its text holds a line end, (vocab,)."""
    known = min(vocab_size, tokenizer.vocab_size)
    held = ["\n" in tokenizer.decode([token]) for token in range(known)]
    return torch.tensor(held + [False] * (vocab_size - known))


def collate(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, prompt lengths, lengths) of a batch, padded at the right."""
    rows = [[*example.prompt, *example.answer] for example in examples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([len(example.prompt) for example in examples]), torch.tensor(list(map(len, rows)))


def verifier_loss(model: Verifier, groups: Sequence[Sequence[Example]], pad: int, settings: VerifierSettings) -> Tensor:
    """The weighted sum of the terms, each a mean: -log p of a right sample, -log sigmoid(S right - S wrong) over the
    pairs of a problem, cross-entropy of a step's label."""
    flat = [example for group in groups for example in group]
    scores = model(*collate(flat, pad))
    right = torch.tensor([example.correct for example in flat])
    loss: Tensor = -settings.text_weight * scores.likelihood[right].mean()
    pairs, place = [], 0
    for group in groups:
        mine, good = scores.total[place : place + len(group)], right[place : place + len(group)]
        if good.any() and not good.all():
            pairs.append(-F.logsigmoid(mine[good][:, None] - mine[~good][None, :]).mean())
        place += len(group)
    if pairs:
        loss = loss + settings.pair_weight * torch.stack(pairs).mean()
    labelled = [row for row, example in enumerate(flat) if example.labels is not None]
    if labelled and settings.step_weight:
        terms = []
        for row in labelled:
            wanted = torch.tensor(flat[row].labels)
            sound = scores.running[row][scores.at_end[row]].clamp(max=-1e-6)
            terms.append(-(wanted * sound + (1 - wanted) * torch.log(-torch.expm1(sound))).mean())
        loss = loss + settings.step_weight * torch.stack(terms).mean()
    return loss


def train_verifier(
    model_dir: Path,
    problems: Sequence[Sequence[Example]],
    settings: VerifierSettings,
    out: Path,
    update: progress.Update = progress.silent,
) -> list[float]:
    """Trains a verifier on top of a stock model and writes it to `out`; returns the loss of every update.

    problems: the examples of each problem; those without a right one are left out. A run that was killed goes on from
    its last state, saved every minute. Raises BadInput when no problem has right and wrong ones.
    """
    useful = [group for group in problems if any(example.correct for example in group)]
    if all(example.correct for group in useful for example in group):
        raise BadInput("no problem has right and wrong samples: nothing to learn a verifier from")
    tokenizer = load_tokenizer(model_dir)
    decoder = load_model(model_dir)
    torch.manual_seed(settings.seed)
    model = Verifier(decoder, step_ends(tokenizer, decoder.config.vocab_size)).train()
    decoder.requires_grad_(not settings.frozen)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    if (out / STATE).exists():
        state = torch.load(io.BytesIO((out / STATE).read_bytes()), weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        losses = state["losses"]
    saved = time.monotonic()
    for step, batch in enumerate(islice(_batches(useful, settings), len(losses), settings.steps), len(losses)):
        warm = min(1.0, (step + 1) / (0.05 * settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        loss = verifier_loss(model, batch, tokenizer.pad_id, settings)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise records.Failed(f"{out}: the loss is {losses[-1]} at update {step}: lower lr")
        update(step + 1, f"loss {losses[-1]:.4f}")
        if time.monotonic() - saved > SAVE_SECONDS:
            _save_state(model, optimiser, losses, out)
            saved = time.monotonic()
    save_verifier(model, out, model_dir, settings)
    (out / STATE).unlink(missing_ok=True)
    return losses


def _batches(useful: Sequence[Sequence[Example]], settings: VerifierSettings) -> Iterator[list[list[Example]]]:
    """Batches without end: every problem once a pass, in another order each time, up to the tokens of a batch.

    A problem gives the likeliest of its right samples, the others being near copies of it or right in spite of a slip,
    which must not be learnt, and one of its wrong ones.
    """
    dice = np.random.default_rng(settings.seed)
    batch: list[list[Example]] = []
    tokens = 0
    while True:
        for place in dice.permutation(len(useful)):
            drawn = [max((e for e in useful[place] if e.correct), key=lambda e: e.logprob)]
            wrong = [example for example in useful[place] if not example.correct]
            if wrong:
                drawn.append(wrong[dice.integers(len(wrong))])
            batch.append(drawn)
            tokens += sum(len(example.prompt) + len(example.answer) for example in drawn)
            if tokens >= settings.batch_tokens:
                yield batch
                batch, tokens = [], 0


def _save_state(model: Verifier, optimiser: torch.optim.Optimizer, losses: list[float], out: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses}, buffer)
    records.write_bytes(out / STATE, buffer.getvalue())


def save_verifier(model: Verifier, out: Path, tokenizer_from: Path, settings: VerifierSettings) -> None:
    """Writes the decoder as a stock directory with the head and a note beside it."""
    save_model(model.decoder, out, tokenizer_from=tokenizer_from)
    head = {"head.weight": model.head.weight, "head.bias": model.head.bias, "alpha": model.alpha}
    records.write_bytes(out / HEAD, save({name: tensor.detach().contiguous() for name, tensor in head.items()}))
    records.write_json(out / NOTE, {"kind": "thinkfast verifier", "settings": asdict(settings)})


def load_verifier(directory: Path) -> tuple[Verifier, Tokenizer]:
    """Reads what `save_verifier` wrote. Raises BadInput naming what is missing."""
    for name in (NOTE, HEAD):
        if not (directory / name).is_file():
            raise BadInput(f"{directory / name}: missing: not a verifier made by train-reward")
    tokenizer, decoder = load_tokenizer(directory), load_model(directory)
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise BadInput(f"{directory}: the tokenizer has more tokens than the model, it is another model's")
    model = Verifier(decoder, step_ends(tokenizer, decoder.config.vocab_size))
    tensors = load_file(directory / HEAD)
    if tensors["head.weight"].shape != model.head.weight.shape:
        shape = tuple(tensors["head.weight"].shape)
        raise BadInput(f"{directory / HEAD}: head.weight is {shape}, expected {tuple(model.head.weight.shape)}")
    model.load_state_dict(tensors, strict=False)
    return model.eval(), tokenizer


@torch.inference_mode()
def score_examples(
    model: Verifier, examples: Sequence[Example], pad: int, batch_tokens: int = 32_000
) -> Iterator[tuple[int, float, list[float], float]]:
    """Yields (place, S, S up to every step end, seconds) for every example, long ones together."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].answer))
    while order:
        widest = examples[order[-1]]
        count = max(1, batch_tokens // max(1, len(widest.prompt) + len(widest.answer)))
        rows, order = order[-count:], order[:-count]
        started = time.monotonic()
        total, running, at_end, _ = model(*collate([examples[i] for i in rows], pad))
        seconds = (time.monotonic() - started) / len(rows)
        for row, place in enumerate(rows):
            yield place, float(total[row]), running[row][at_end[row]].tolist(), seconds


Roll = Callable[[Sequence[Sequence[int]], int], list[list[tuple[int, ...]]]]
"""Draws n continuations of every prompt: `lambda prompts, n: ...` around `Engine.sample`."""


def rollout_labels(
    examples: Sequence[Example], ends: Tensor, roll: Roll, right: Callable[[int, tuple[int, ...]], bool], n: int
) -> list[Example]:
    """The examples with labels: from behind every step n continuations are drawn and graded.

    `right(i, answer)` grades a whole answer to the problem of example i. The last step's label is the verdict itself.
    """
    prefixes, owners = [], []
    cuts = [[at for at, token in enumerate(e.answer[:-1]) if ends[token]] for e in examples]
    for i, (example, places) in enumerate(zip(examples, cuts, strict=True)):
        for at in places:
            prefixes.append([*example.prompt, *example.answer[: at + 1]])
            owners.append((i, at))
    shares: dict[tuple[int, int], float] = {}
    for (i, at), drawn in zip(owners, roll(prefixes, n), strict=True):
        begun = examples[i].answer[: at + 1]
        shares[i, at] = sum(right(i, (*begun, *rest)) for rest in drawn) / max(len(drawn), 1)
    return [
        replace(e, labels=(*(shares[i, at] for at in places), float(e.correct)))
        for i, (e, places) in enumerate(zip(examples, cuts, strict=True))
    ]


def describe(losses: Sequence[float]) -> str:
    """First and last losses, as JSON for a log."""
    tail = max(1, len(losses) // 10)
    return json.dumps({"first": float(np.mean(losses[:tail])), "last": float(np.mean(losses[-tail:]))})
