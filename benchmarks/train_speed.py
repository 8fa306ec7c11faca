"""Seconds of a training step of one student here and in the stock class of `transformers`: same weights, same batch.

    python benchmarks/train_speed.py --out benchmarks/results/train-speed.json

A step is forward, cross-entropy over every token, backward and AdamW. Losses and gradient norms of the first step have
to agree. The floor is the time of the step's matrix products alone at the rate of the fastest product measured here;
the share reached is floor / seconds.

The stock class runs twice: with the chunk that the student's config.json names (32, "own"), and with its default (256).
All comparisons take turns, a step of each side at a time in every round, and the median over the rounds counts: a
machine that is disturbed for some seconds disturbs them all alike, and few of each one's steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from thinkfast import runtime
from thinkfast.data.chat import render_prompt
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.model.checkpoint import load_model, save_model
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.stages import teacher_directory
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan

STOCK_CHUNK = 256
"""What stock configurations have. The students here are written with their head width, 32, which is faster in both."""


def batch_of(teacher: Path, rows: int, length: int) -> Tensor:
    """Word problems with their solutions, one after the other, cut into rows (rows, length)."""
    tokenizer, ids = load_tokenizer(teacher), list[int]()
    for made in generate(1, 40, "train", [8, 9, 10]):
        ids += [*render_prompt(tokenizer, made.problem), *tokenizer.encode(made.solution), tokenizer.eos_id]
    return torch.tensor(ids[: rows * length]).view(rows, length)


def gemm_rate() -> float:
    """Multiply-adds a second of the fastest large float32 product, times two."""
    best = 0.0
    for size in (512, 1024, 1536):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def step_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """Floating point operations of the matrix products of a step: forward once, backward twice. The recurrence counts
    as the chunked form here does it, attention with all pairs of its causal half."""
    hidden, tokens, mamba = config.hidden_size, rows * length, config.mamba
    total = float(config.vocab_size * hidden)
    for kind in config.layer_types:
        total += 3 * hidden * config.intermediate_size
        if kind == ATTENTION:
            wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            total += hidden * (2 * wide + 2 * narrow) + length * wide
        elif mamba is not None:
            pairs = mamba.chunk_size * (mamba.d_state + mamba.head_dim) + 2 * mamba.d_state * mamba.head_dim
            total += hidden * (mamba.in_proj_rows + mamba.d_inner) + mamba.n_heads * pairs
    return 3 * 2 * total * tokens


def stepper(model: nn.Module, logits: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[], dict[str, float]]:
    """A function that makes one training step and tells its seconds, loss and gradient norm."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> dict[str, float]:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        return {"seconds": time.perf_counter() - start, "loss": float(loss.detach()), "gradient": float(norm)}

    return step


@dataclass
class Comparison:
    """Two sides that train the same student, and what each of their steps said."""

    name: str
    chunk: int | None
    config: DecoderConfig
    sides: dict[str, Callable[[], dict[str, float]]]
    found: dict[str, list[dict[str, float]]]

    def turn(self) -> None:
        """One step of each side."""
        for side, step in self.sides.items():
            self.found[side].append(step())

    def check(self) -> None:
        """Raises SystemExit unless the first steps did the same work."""
        first = [rows[0] for rows in self.found.values()]
        for key in ("loss", "gradient"):
            if abs(first[0][key] - first[1][key]) > 2e-3 * abs(first[1][key]):
                here = f"{key} {first[0][key]} here, {first[1][key]} in transformers"
                raise SystemExit(f"{self.name}: {here}: not the same work")

    def summary(self, ids: Tensor, rate: float) -> dict[str, object]:
        """Medians of all steps but the first, and the floor."""
        medians = {side: statistics.median(row["seconds"] for row in rows[1:]) for side, rows in self.found.items()}
        floor = step_flops(self.config, *ids.shape) / rate
        return {
            "stock_chunk": self.chunk,
            "first_step": {side: rows[0] for side, rows in self.found.items()},
            "seconds": medians,
            "fastest_step": {side: min(row["seconds"] for row in rows) for side, rows in self.found.items()},
            "every_step": {side: [row["seconds"] for row in rows] for side, rows in self.found.items()},
            "tokens_per_second": {side: ids.numel() / seconds for side, seconds in medians.items()},
            "times_faster": medians["transformers"] / medians["thinkfast"],
            "floor_seconds": floor,
            "share_of_floor": floor / medians["thinkfast"],
        }


def prepare(name: str, attention: tuple[int, ...], chunk: int | None, ids: Tensor) -> Comparison:
    """Both sides of one student of the bundled teacher; `chunk` is that of the stock class' recurrence, by default the
    one that the student's config.json names."""
    teacher = load_model(teacher_directory("bundled"))
    ours: Decoder = convert(teacher, LayerPlan(attention), ids[:2, :256])
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not attention:
        # The inert layer that stock classes ask for is no part of the student's work.
        stock.model.layers = stock.model.layers[:-1]
        stock.config.num_hidden_layers -= 1
        stock.config.layer_types = stock.config.layer_types[:-1]
    if chunk is not None:
        for layer in stock.model.layers:
            if layer.mamba is not None:
                layer.mamba.chunk_size = chunk
    ours.train(), stock.train()
    sides = {
        "thinkfast": stepper(ours, ours, ids),
        "transformers": stepper(stock, lambda x: stock(x, use_cache=False).logits, ids),
    }
    return Comparison(name, chunk, ours.config, sides, {side: [] for side in sides})


def main() -> None:
    """Measures a pure and a hybrid student and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=31, help="rounds that count; there is one more before them")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ids, rate = batch_of(teacher_directory("bundled"), given.rows, given.length), gemm_rate()
    students: dict[str, tuple[int, ...]] = {"pure": (), "hybrid": (2,)}
    comparisons = [
        prepare(f"{name}, {'own' if chunk is None else chunk}", kept, chunk, ids)
        for name, kept in students.items()
        for chunk in (None, STOCK_CHUNK)
    ]
    for round_ in range(given.steps + 1):
        for comparison in comparisons:
            comparison.turn()
            if round_ == 0:
                comparison.check()
    rows = {comparison.name: comparison.summary(ids, rate) for comparison in comparisons}
    document = {
        "command": runtime.command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": runtime.code_version(),
        "machine": runtime.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "batch": [given.rows, given.length],
        "steps": given.steps,
        "gflops": rate / 1e9,
        "students": rows,
    }
    for name, row in rows.items():
        print(f"{name}: {row['times_faster']:.1f} times faster, {row['share_of_floor']:.0%} of the floor")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
