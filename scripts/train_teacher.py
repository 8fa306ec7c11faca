"""Trains the bundled teacher from scratch: a small Llama that solves the generated word problems step by step.

    python scripts/train_teacher.py OUT

Writes OUT/model (a stock Llama directory with its tokenizer) and OUT/training.jsonl (a row every 50 steps: tokens seen,
mean loss, seconds). Interrupted, it goes on from OUT/state.pt, which is written every 200 steps. Cross-entropy on the
solution's tokens only; Muon on the matrices inside the blocks (arXiv 2502.16982), AdamW on embedding and norms; a
constant rate, then half of it. The run ends at `--stop`, long before everything is learnt: a teacher that still slips
here and there, seldom twice at the same place, so that there is something to win by sampling it often.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkfast.data import chat, tokenizer, wordproblems
from thinkfast.model.checkpoint import save_model
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder

POOL = 1024


def teacher_config(words: tokenizer.Tokenizer) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=words.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        layer_types=(ATTENTION,) * 4,
        max_position_embeddings=2048,
        bos_token_id=words.encode(tokenizer.BOS)[0],
        eos_token_ids=(words.eos_id,),
        pad_token_id=words.pad_id,
    )


def batches(words: tokenizer.Tokenizer, chosen: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input_ids, completion mask) of about `batch` tokens, documents of similar length together.

    The first `easy` share of the tokens has the lower half of the levels only: short documents teach the arithmetic
    at less cost.
    """
    levels = sorted(chosen.levels)
    easy = wordproblems.stream(chosen.seed, "train", levels[: (len(levels) + 1) // 2])
    mixed = wordproblems.stream(chosen.seed + 1, "train", levels)
    rng = random.Random(chosen.seed)
    size, given = chosen.batch, 0
    while True:
        pool = []
        problems = easy if given < chosen.easy * chosen.tokens else mixed
        for _ in range(POOL):
            problem = next(problems)
            prompt = chat.render_prompt(words, problem.problem)
            pool.append((prompt, [*words.encode(problem.solution), words.eos_id]))
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        cut: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if (len(cut[-1]) + 1) * (len(pair[0]) + len(pair[1])) > size and cut[-1]:
                cut.append([])
            cut[-1].append(pair)
        rng.shuffle(cut)
        for group in cut:
            ids, mask = pad(group, words.pad_id)
            given += ids.numel()
            yield ids, mask


def pad(group: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) + len(solution) for prompt, solution in group)
    ids = torch.full((len(group), longest), pad_id)
    mask = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, (prompt, solution) in enumerate(group):
        ids[row, : len(prompt) + len(solution)] = torch.tensor(prompt + solution)
        mask[row, len(prompt) : len(prompt) + len(solution)] = True
    return ids, mask


def rate(done: float, decay: float, floor: float) -> float:
    """Learning-rate factor after a share `done` of the tokens: constant, then falling to zero over the last `decay`,
    but not below `floor`."""
    return min(1.0, max(floor, (1 - done) / decay))


def initialise(model: Decoder) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(parameter)


class Muon:
    """Momentum whose update is orthogonalised by Newton-Schulz (arXiv 2502.16982), in float32 and batched by shape:
    on processors without bfloat16 arithmetic many times faster than `torch.optim.Muon`."""

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, momenta in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            momenta.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(momenta, self.momentum))
            scale = max(1.0, group[0].shape[0] / group[0].shape[1]) ** 0.5
            for parameter, direction in zip(group, update, strict=True):
                parameter.sub_(direction, alpha=lr * scale)


def orthogonal(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to each of `update` (N, rows, columns), by five Newton-Schulz steps."""
    tall = update.shape[1] > update.shape[2]
    x = update.transpose(1, 2) if tall else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("out", type=Path)
    options.add_argument("--tokens", type=int, default=9_000_000)
    options.add_argument("--stop", type=int, default=9_213_000)
    options.add_argument("--batch", type=int, default=3072)
    options.add_argument("--muon-lr", type=float, default=0.006)
    options.add_argument("--adam-lr", type=float, default=0.003)
    options.add_argument("--decay", type=float, default=0.4)
    options.add_argument("--floor", type=float, default=0.5)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--levels", type=int, nargs="+", default=list(range(1, 11)))
    options.add_argument("--easy", type=float, default=0.35)
    chosen = options.parse_args()

    torch.manual_seed(chosen.seed)
    tokenizer.save_word_tokenizer(chosen.out)
    words = tokenizer.load_tokenizer(chosen.out)
    model = Decoder(teacher_config(words))
    initialise(model)
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers")]
    outer = [p for n, p in model.named_parameters() if p.dim() != 2 or not n.startswith("layers")]
    muon = Muon(inner)
    adam = torch.optim.AdamW(outer, lr=chosen.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    source = batches(words, chosen)
    state_path = chosen.out / "state.pt"
    step, seen, spent, running = 0, 0, 0.0, 0.0
    if state_path.exists():
        saved = torch.load(state_path)
        model.load_state_dict(saved["model"])
        muon.momenta = saved["muon"]
        adam.load_state_dict(saved["adam"])
        step, seen, spent = saved["step"], saved["seen"], saved["spent"]
        for _ in range(step):
            next(source)
    log_path = chosen.out / "training.jsonl"
    kept = [line for line in log_path.read_text().splitlines() if json.loads(line)["step"] <= step] if step else []
    log_path.write_text("".join(f"{line}\n" for line in kept))
    log = log_path.open("a")
    started = time.monotonic()
    while seen < chosen.stop:
        ids, mask = next(source)
        factor = rate(seen / chosen.tokens, chosen.decay, chosen.floor) * min(1.0, (step + 1) / 100)
        for group in adam.param_groups:
            group["lr"] = chosen.adam_lr * factor
        hidden = model.hidden(ids[:, :-1])[mask[:, 1:]]
        loss = F.cross_entropy(F.linear(hidden, model.head_weight), ids[:, 1:][mask[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(outer, 1.0)
        muon.step(chosen.muon_lr * factor)
        adam.step()
        model.zero_grad()
        step, seen, running = step + 1, seen + ids.numel(), running + loss.item()
        if step % 50 == 0:
            seconds = spent + time.monotonic() - started
            row = {"step": step, "tokens": seen, "loss": round(running / 50, 5), "seconds": round(seconds, 1)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            running = 0.0
        if step % 200 == 0:
            state = {"model": model.state_dict(), "muon": muon.momenta, "adam": adam.state_dict()}
            state |= {"step": step, "seen": seen, "spent": spent + time.monotonic() - started}
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
    save_model(model, chosen.out / "model", tokenizer_from=chosen.out)


if __name__ == "__main__":
    main()
