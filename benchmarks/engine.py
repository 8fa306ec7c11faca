"""Prefill shared by samples, pieces of prompts, speculative decoding, and greedy tokens against the naive path.

python benchmarks/engine.py --teacher bundled --draft runs/demo-quick/models/hybrid --out benchmarks/results/engine.json

Clock: time.monotonic; float32 weights; medians of alternating runs; threads as torch has them. Prompts are held-out
word problems of the bundled kind, or random tokens where their length is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from thinkfast import runtime
from thinkfast.data.chat import render_prompt
from thinkfast.data.tokenizer import load_tokenizer
from thinkfast.data.wordproblems import generate
from thinkfast.engine import Engine, SamplingParams
from thinkfast.engine.backends import open_backend
from thinkfast.engine.slots import SlotTable
from thinkfast.engine.speculative import SpeculativeBackend
from thinkfast.model.checkpoint import load_model
from thinkfast.model.decoder import Decoder

GREEDY = SamplingParams(max_tokens=300, temperature=0.0)


def shared_prefill(model: Decoder, repeats: int) -> dict[str, float]:
    """Milliseconds until 1 and 64 samples of a prompt of 512 tokens are ready for their first step."""
    memory = open_backend(model).memory(64, 640)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 511).tolist()
    times: dict[int, list[float]] = {1: [], 64: []}
    for _ in range(repeats):
        for n, taken in times.items():
            started = time.monotonic()
            (kept,) = memory.prefill([prompt])
            for slot in range(n):
                memory.fork(kept, slot)
            taken.append(1000 * (time.monotonic() - started))
    one, many = (statistics.median(times[n]) for n in (1, 64))
    return {"one_ms": one, "sixty_four_ms": many, "ratio": many / one}


def pieces(model: Decoder, repeats: int) -> dict[str, object]:
    """For 64 running samples at 256 tokens: milliseconds of a step, and of the longest piece of a prompt of 1,536."""
    memory = open_backend(model).memory(64, 1600)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 1536).tolist()
    (behind,) = memory.prefill([ids[:256]])
    table = SlotTable(64, GREEDY, model.config.vocab_size, ())
    for slot in range(64):
        memory.fork(behind, slot)
    every = np.arange(64, dtype=np.int32)
    steps, longest, whole = [], {}, {}
    for size in (64, 128, 256, 512, 1536) * repeats:
        for slot in range(64):
            table.admit(slot, (0, slot), 1, 256, slot, 0.0)
        started = time.monotonic()
        memory.step(table, every)
        steps.append(1000 * (time.monotonic() - started))
        kept, parts = None, []
        for at in range(0, len(ids), size):
            started = time.monotonic()
            (kept,) = memory.prefill([ids[at : at + size]], [kept])
            parts.append(1000 * (time.monotonic() - started))
        longest.setdefault(size, []).append(max(parts))
        whole.setdefault(size, []).append(sum(parts))
    told = {size: [statistics.median(v[size]) for v in (longest, whole)] for size in longest}
    rows = [{"piece": size, "longest_ms": piece, "prompt_ms": total} for size, (piece, total) in told.items()]
    return {"step_ms": statistics.median(steps), "pieces": rows}


def speculation(model: Decoder, draft: Decoder, prompts: list[list[int]], repeats: int) -> list[dict[str, object]]:
    """Tokens a second at 1, 2 and 4 slots, of the draft guessing ahead and of the model alone on each back end."""
    rows = []
    for slots in (1, 2, 4):
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=200, temperature=temperature, seed=1)
            engines = {name: Engine(model, slots, name) for name in ("native", "torch")}
            engines["speculative"] = Engine(model, slots, draft=draft)
            rates: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(repeats):
                for name, engine in engines.items():
                    started = time.monotonic()
                    drawn = engine.sample(prompts[:4], 1, params)
                    taken = time.monotonic() - started
                    rates[name].append(sum(len(row[0].token_ids) for row in drawn) / taken)
            found = {name: statistics.median(rate) for name, rate in rates.items()}
            ratios = {f"over_{name}": found["speculative"] / found[name] for name in ("torch", "native")}
            taken = guesses_taken(model, draft, slots, prompts[:4], params)
            rows.append({"slots": slots, "temperature": temperature, "tokens_per_second": found, **ratios, **taken})
    return rows


def guesses_taken(
    model: Decoder, draft: Decoder, slots: int, prompts: list[list[int]], params: SamplingParams
) -> dict[str, float]:
    """Tokens that one pass of the model yields."""
    engine = Engine(model, slots, draft=draft)
    backend = SpeculativeBackend(model, draft)
    memory = backend.memory(slots, max(map(len, prompts)) + params.max_tokens)
    passes = 0
    run = memory._model.run

    def counted(pieces: dict[int, list[int]], exact: bool) -> object:
        nonlocal passes
        passes += len(pieces) if not exact else 0
        return run(pieces, exact)

    memory._model.run = counted
    engine._take_memory = lambda slots, capacity: memory
    drawn = sum(len(row[0].token_ids) for row in engine.sample(prompts, 1, params))
    return {"tokens_per_pass": drawn / max(passes, 1)}


def agreement(model: Decoder, draft: Decoder, prompts: list[list[int]]) -> list[dict[str, object]]:
    """Greedy tokens of every path, forked and ragged, against the argmax of one float32 forward over the same tokens.

    A difference is a tie where the two logits are nearer than that path's rounding moves them: 1e-4 of the largest for
    float32, 2e-2 for keys and values in bfloat16.
    """
    paths = {
        "native float32": (Engine(model, 24, "native", "float32"), 1e-4),
        "native bfloat16": (Engine(model, 24, "native", "bfloat16"), 2e-2),
        "torch float32": (Engine(model, 24, "torch", "float32"), 1e-4),
        "torch bfloat16": (Engine(model, 24, "torch", "bfloat16"), 2e-2),
        "speculative float32": (Engine(model, 4, kv_dtype="float32", draft=draft), 1e-4),
    }
    rows = []
    for name, (engine, rounding) in paths.items():
        slow = name.startswith("spec")
        drawn = engine.sample(prompts[:8] if slow else prompts, 1 if slow else 2, GREEDY)
        count = differ = ties = 0
        widest = 0.0
        for prompt, row in zip(prompts, drawn, strict=False):
            for sample in row:
                ids = list(sample.token_ids) + (
                    [model.config.eos_token_ids[0]] if sample.finish_reason == "stop" else []
                )
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
                gap = (logits.max(-1).values - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]) / logits.abs().max()
                count += len(ids)
                differ += int((gap > 0).sum())
                ties += int(((gap > 0) & (gap <= rounding)).sum())
                widest = max(widest, float(gap.max()))
        rows.append({"path": name, "tokens": count, "different": differ, "ties": ties, "widest_gap": widest})
    return rows


def main() -> None:
    """Measures everything and writes one document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="bundled")
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    teacher = runtime.ASSETS / "teacher" if given.teacher == "bundled" else Path(given.teacher)
    model, draft = load_model(teacher), load_model(given.draft)
    tokenizer = load_tokenizer(teacher)
    prompts = [render_prompt(tokenizer, made.problem) for made in generate(0, given.problems, "held-out", [3, 4, 5])]
    document: dict[str, object] = {"command": runtime.command(), "machine": runtime.machine()}
    document |= {"threads": torch.get_num_threads(), "repeats": given.repeats, "weights": "float32"}
    document["shared_prefill"] = {
        name: shared_prefill(m, 3 * given.repeats) for name, m in (("teacher", model), ("draft", draft))
    }
    document["pieces"] = pieces(model, given.repeats)
    document["speculation"] = speculation(model, draft, prompts, given.repeats)
    document["greedy"] = agreement(model, draft, prompts)
    given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
