"""Greedy tokens of the kernels against the naive float32 forward without a cache, on demo problems.

    python benchmarks/agreement.py bundled runs/demo/models/pure --out benchmarks/results/agreement.json

Every way draws its own greedy chains. Each token is then judged by `Decoder.forward` in float32 over the chain: it
agrees where it is the likeliest there. For those that are not, `gap` is how far the chosen token's logit lies below the
largest one; `rounding` is the largest difference between the way's logits and the naive ones over all tokens. A gap of
at most twice the rounding is a tie within rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from thinkfast import records, runtime
from thinkfast.bench.machine import describe_machine
from thinkfast.data.chat import render_prompt
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.engine.backends import NativeBackend
from thinkfast.engine.sampling import SamplingParams
from thinkfast.engine.slots import SlotTable
from thinkfast.model.checkpoint import load_model
from thinkfast.model.decoder import Decoder
from thinkfast.stages import teacher_directory

WAYS = {
    "float32 weights, float32 keys": ("float32", "float32"),
    "float32 weights, bfloat16 keys": ("float32", "bfloat16"),
    "bfloat16 weights, bfloat16 keys": ("bfloat16", "bfloat16"),
}


def chains(
    model: Decoder, prompts: list[list[int]], weights: str, kv: str, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens (prompts, tokens) and the logits they were drawn from."""
    memory = NativeBackend(model, kv, weights).memory(len(prompts), max(map(len, prompts)) + tokens)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    table = SlotTable(len(prompts), params, model.config.vocab_size, ())
    for slot, kept in enumerate(memory.prefill([prompt[:-1] for prompt in prompts])):
        memory.fork(kept, slot)
        table.admit(slot, (slot, 0), prompts[slot][-1], len(prompts[slot]) - 1, 0, 0.0)
    rows = np.arange(len(prompts), dtype=np.int32)
    drawn, logits = [], []
    for _ in range(tokens):
        seen = np.empty((len(rows), model.config.vocab_size), np.float32)
        step = memory.step(table, rows, seen)
        table.advance(rows, *step)
        drawn.append(step[0])
        logits.append(seen)
    return np.stack(drawn, 1), np.stack(logits, 1)


@torch.inference_mode()
def judge(model: Decoder, prompts: list[list[int]], drawn: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Counts disagreements and how large they are."""
    different, within, gaps, rounding = 0, 0, [0.0], 0.0
    for prompt, tokens, own in zip(prompts, drawn, logits, strict=True):
        ids = torch.tensor([[*prompt, *tokens.tolist()]])
        naive = model(ids)[0, len(prompt) - 1 : -1].numpy()
        rounding = max(rounding, float(np.abs(naive - own).max()))
        gap = naive.max(1) - naive[np.arange(len(tokens)), tokens]
        gaps += gap[gap > 0].tolist()
    different = len(gaps) - 1
    within = sum(0 < gap <= 2 * rounding for gap in gaps)
    return {
        "tokens": int(drawn.size),
        "different": different,
        "ties_within_rounding": within,
        "largest_gap": max(gaps),
        "rounding": rounding,
    }


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model directories or 'bundled'")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for place in map(teacher_directory, given.models):
        model, tokenizer = load_model(place), load_tokenizer(place)
        problems = generate(11, given.problems, "held-out", (2, 4, 6))
        prompts = [render_prompt(tokenizer, problem.problem) for problem in problems]
        ways = found[place.resolve().name] = {}
        for way, (weights, kv) in WAYS.items():
            ways[way] = judge(model, prompts, *chains(model, prompts, weights, kv, given.tokens))
            print(place.resolve().name, way, ways[way])
    records.write_json(given.out, {"command": runtime.command(), "machine": describe_machine(), "models": found})


if __name__ == "__main__":
    main()
