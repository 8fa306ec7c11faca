"""One decoding step in torch, in torch under torch.compile, and in our C++: which should be the CPU path?

    python benchmarks/compile_or_cpp.py bundled runs/bench/pure --out benchmarks/results/compile-or-cpp.json

Batch 128 behind 256 tokens, the three taking turns; medians of microseconds a token without sampling. Compiling is
timed as well: it comes back for every new shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from thinkfast import records, runtime
from thinkfast.bench.machine import describe_machine
from thinkfast.engine.backends import NativeBackend
from thinkfast.model.cache import AttentionCache, Cache, new_cache
from thinkfast.model.checkpoint import load_model
from thinkfast.model.decoder import Decoder
from thinkfast.ops.cpu.native import NativePool
from thinkfast.stages import teacher_directory

BATCH, CONTEXT, STEPS = 128, 256, 8


def torch_step(model: Decoder, run: Callable[[torch.Tensor, Cache], torch.Tensor]) -> Callable[[], None]:
    """Steps of `run` behind the same context again and again."""
    cache = new_cache(model.config, BATCH, CONTEXT + STEPS, torch.float32)
    ids = torch.ones(BATCH, 1, dtype=torch.int64)

    def turn() -> None:
        for layer in cache.layers:
            if isinstance(layer, AttentionCache):
                layer.lengths.fill_(CONTEXT)
        with torch.inference_mode():
            for _ in range(STEPS):
                run(ids, cache)

    return turn


def native_step(model: Decoder) -> Callable[[], None]:
    """The same in C++, keys and values in float32 as well; it draws too, greedily."""
    pool = NativePool(NativeBackend(model, "float32").model, BATCH, CONTEXT + STEPS, False, torch.get_num_threads())
    pool.prefill(range(BATCH), [np.random.default_rng(row).integers(3, 90, CONTEXT).tolist() for row in range(BATCH)])
    slots, tokens = np.arange(BATCH, dtype=np.int32), np.ones(BATCH, np.int32)
    keys, counters = np.zeros(BATCH, np.uint64), np.zeros(BATCH, np.int64)

    def turn() -> None:
        for step in range(STEPS):
            pool.step(slots, tokens, np.full(BATCH, CONTEXT + step, np.int32), keys, counters, 0.0, 0, 1.0)

    return turn


def measure(model: Decoder, repeats: int) -> dict[str, float]:
    """Microseconds a token of every way, and the seconds that compiling took."""
    started = time.perf_counter()
    compiled = torch_step(model, torch.compile(model))
    compiled()
    compiling = time.perf_counter() - started
    ways = {"torch": torch_step(model, model), "torch.compile": compiled, "C++": native_step(model)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, turn in ways.items():
            start = time.perf_counter()
            turn()
            times[name].append((time.perf_counter() - start) / (STEPS * BATCH) * 1e6)
    return {**{name: statistics.median(taken[1:]) for name, taken in times.items()}, "compiling_seconds": compiling}


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model directories or 'bundled'")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    directories = [teacher_directory(model) for model in given.models]
    found = {place.resolve().name: measure(load_model(place), given.repeats) for place in directories}
    document = {"command": runtime.command(), "machine": describe_machine(), "batch": BATCH, "context": CONTEXT}
    records.write_json(given.out, {**document, "microseconds_per_token": found})
    print(found)


if __name__ == "__main__":
    main()
