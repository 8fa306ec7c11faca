"""Tokens per second over batch and context, of several models and back ends that take turns, beside the floor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from thinkfast.bench.machine import (
    Limits,
    buffer_size,
    bytes_per_token,
    describe_machine,
    flops_per_token,
    prefill_flops,
)
from thinkfast.bench.peers import PEERS, open_peer
from thinkfast.engine.backends import (
    AHEAD,
    BACKENDS,
    Backend,
    Memory,
    NativeBackend,
    NativeMemory,
    decode,
    open_backend,
)
from thinkfast.engine.sampling import SamplingParams, sample_key
from thinkfast.engine.slots import SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Speed:
    """One model in one back end at one batch and context. Times are medians; `share` is floor over measured time.

    The floor of a token is the larger of its bytes at the machine's measured read bandwidth (for a buffer as large as
    what a step touches) and its floating-point operations at the machine's measured rate of matrix products, medians of
    what was measured between the turns. `fastest_share` sets the fastest turn against the best rates. `shared` of the
    `context` tokens are one prompt for all rows. `model` is the name of the model, with the back end behind an @ where
    several were measured.
    """

    model: str
    backend: str
    batch: int
    context: int
    shared: int
    tokens_per_second: float
    microseconds_per_token: float
    fastest_microseconds_per_token: float
    bytes_per_token: float
    flops_per_token: float
    floor_microseconds_per_token: float
    share: float
    fastest_share: float


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompts fed at once, in tokens a second, beside the floor of their operations; and what forking adds.

    `fork_ratio`: time until `forks` samples of one prompt can start, over the time until one can.
    """

    model: str
    backend: str
    prompts: int
    length: int
    tokens_per_second: float
    share: float
    forks: int
    fork_ratio: float


class Runner(Protocol):
    """A model in a back end."""

    kv_dtype: str
    weights: str

    def start(self, batch: int, context: int, steps: int) -> None:
        """Makes rows whose steps see `context` tokens at the middle of a turn. Raises BadInput."""

    def turn(self, steps: int) -> float:
        """Seconds that `steps` steps take."""


def decode_speeds(
    models: Mapping[str, Decoder],
    batches: Sequence[int] = (1, 16, 128),
    contexts: Sequence[int] = (64, 256, 1000),
    *,
    steps: int = AHEAD,
    repeats: int = 15,
    backend: str | Sequence[str] = "auto",
    kv_dtype: str = "auto",
    weights: str = "auto",
    temperature: float = 0.8,
    shared: Sequence[int] = (0,),
    prompts: Sequence[int] = (),
) -> dict[str, object]:
    """Measures every model at every batch and context, sampling included, and returns {"machine", "rows", "prefill"}.

    They take turns `repeats` times, `steps` decoding steps each, by default as many as the native back end makes in a
    row, so that a change of the machine's pace meets all of them; what the machine can do is measured between turns.
    Slots hold the state behind a random prompt; context is the number of tokens a step sees at the middle of the
    measurement. `shared`: how many of them are one prompt that all rows have in common; the native back end reads
    those once. `prompts`: lengths to feed, `threads` at a time. backend: of "auto", "native", "torch", "transformers",
    "llama.cpp"; the last does not draw. A row is a `Speed` or `Prefill` as a dictionary. Raises BadInput where a
    context leaves no room, for an unknown back end and for one that cannot be had.
    """
    if steps < 1 or repeats < 1:
        raise BadInput(f"steps is {steps} and repeats is {repeats}, expected 1 or more of each")
    names = (backend,) if isinstance(backend, str) else tuple(backend)
    for name in names:
        if name not in (*BACKENDS, *PEERS):
            raise BadInput(f"backend is {name!r}, expected one of {', '.join((*BACKENDS, *PEERS))}")
    runners: dict[str, tuple[str, str, Runner]] = {}
    for name in names:
        for model, decoder in models.items():
            opened = _open(decoder, name, kv_dtype, weights, temperature)
            label = model if len(names) == 1 else f"{model}@{opened.name if isinstance(opened, OurRunner) else name}"
            runners[label] = (model, opened.name if isinstance(opened, OurRunner) else name, opened)
    limits = Limits()
    rows: list[Speed] = []
    for batch in batches:
        for context in contexts:
            for common in shared:
                rows += _place(models, runners, limits, batch, context, common, steps, repeats)
    feeds = [feed for length in prompts for feed in _prefills(models, runners, limits, length, repeats)]
    machine = {
        **describe_machine(),
        "backend": {label: name for label, (_, name, _) in runners.items()},
        "kv_dtype": {label: runner.kv_dtype for label, (_, _, runner) in runners.items()},
        "weights": {label: runner.weights for label, (_, _, runner) in runners.items()},
        "gemm_gflops": limits.gemm / 1e9,
        "read_gigabytes_per_second": {str(size): value / 1e9 for size, value in sorted(limits.bandwidth.items())},
    }
    return {"machine": machine, "rows": [asdict(row) for row in rows], "prefill": [asdict(feed) for feed in feeds]}


def _open(model: Decoder, name: str, kv_dtype: str, weights: str, temperature: float) -> Runner:
    if name in PEERS:
        return open_peer(name, model, temperature)
    return OurRunner(open_backend(model, name, kv_dtype, weights), model, temperature)


def _place(
    models: Mapping[str, Decoder],
    runners: Mapping[str, tuple[str, str, Runner]],
    limits: Limits,
    batch: int,
    context: int,
    shared: int,
    steps: int,
    repeats: int,
) -> list[Speed]:
    """All runners at one batch and context."""
    here = {}
    for label, (model, name, runner) in runners.items():
        if shared and not isinstance(runner, OurRunner):
            continue
        if isinstance(runner, OurRunner):
            runner.shared = shared
        runner.start(batch, context, steps)
        config = models[model].config
        touched = bytes_per_token(config, batch, context, runner.kv_dtype, runner.weights, shared)
        here[label] = (name, runner, touched, flops_per_token(config, context))
    sizes = {buffer_size(touched * batch) for _, _, touched, _ in here.values()}
    times: dict[str, list[float]] = {label: [] for label in here}
    for _ in range(repeats):
        limits.probe(sizes, {runner.weights for _, runner, _, _ in here.values()})
        for label, (_, runner, _, _) in here.items():
            times[label].append(runner.turn(steps) / (steps * batch))
    rows = []
    for label, (name, _, touched, flops) in here.items():
        median, fastest = statistics.median(times[label]), min(times[label])
        floor, best = limits.floor(touched, flops, batch), limits.floor(touched, flops, batch, best=True)
        shares = (floor / median, best / fastest)
        speed = (1 / median, median * 1e6, fastest * 1e6, touched, flops, floor * 1e6, *shares)
        rows.append(Speed(label, name, batch, context, shared, *speed))
    return rows


class OurRunner:
    """Slots of one model, ready to decode at one batch and context."""

    def __init__(self, backend: Backend, model: Decoder, temperature: float) -> None:
        self.backend, self.config, self.temperature = backend, model.config, temperature
        self.name, self.kv_dtype = backend.name, backend.kv_dtype
        own = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        self.weights = backend.weights if isinstance(backend, NativeBackend) else own
        self.shared = 0

    def start(self, batch: int, context: int, steps: int) -> None:
        first = context - steps // 2 - 1
        if first < 1:
            raise BadInput(f"context is {context}, expected at least {steps // 2 + 2} for {steps} steps around it")
        if not 0 <= self.shared <= first:
            raise BadInput(f"{self.shared} tokens are shared of a context of {context}, expected at most {first}")
        params = SamplingParams(max_tokens=steps + 1, temperature=self.temperature, ignore_eos=True)
        self.memory: Memory = self.backend.memory(batch, first + steps + 1)
        self.table = SlotTable(batch, params, self.config.vocab_size, ())
        self.rows = np.arange(batch, dtype=np.int32)
        self.prompt = np.random.default_rng(context).integers(0, self.config.vocab_size, first).tolist()
        self.kept = self.memory.prefill([self.prompt[:-1]])[0]

    def turn(self, steps: int) -> float:
        """Behind one untimed step that touches the pages and warms the caches."""
        for slot in self.rows.tolist():
            if isinstance(self.memory, NativeMemory):
                self.memory.resume(self.kept, slot, self.shared)
            else:
                self.memory.fork(self.kept, slot)
            self.table.admit(slot, (0, slot), self.prompt[-1], len(self.prompt) - 1, sample_key(0, slot), 0.0)
        self.table.advance(self.rows, *self.memory.step(self.table, self.rows))
        start = time.perf_counter()
        while self.table.active.any():
            decode(self.memory, self.table, self.rows, math.inf)
        return time.perf_counter() - start


def _prefills(
    models: Mapping[str, Decoder],
    runners: Mapping[str, tuple[str, str, Runner]],
    limits: Limits,
    length: int,
    repeats: int,
    forks: int = 64,
) -> list[Prefill]:
    ours = {label: (model, runner) for label, (model, _, runner) in runners.items() if isinstance(runner, OurRunner)}
    times: dict[str, list[tuple[float, float, float]]] = {label: [] for label in ours}
    memories = {label: runner.backend.memory(forks, length + 1) for label, (_, runner) in ours.items()}
    together = {label: getattr(memory, "threads", 1) for label, memory in memories.items()}
    for turn in range(repeats + 1):
        for label, (_, runner) in ours.items():
            memory = memories[label]
            vocab = runner.config.vocab_size
            fed = np.random.default_rng(turn).integers(0, vocab, (together[label], length)).tolist()
            start = time.perf_counter()
            memory.prefill(fed)
            many = time.perf_counter() - start
            start = time.perf_counter()
            kept = memory.prefill(fed[:1])[0]
            memory.fork(kept, 0)
            one = time.perf_counter() - start
            start = time.perf_counter()
            for slot in range(1, forks):
                memory.fork(kept, slot)
            rest = time.perf_counter() - start
            if turn:  # the first touches the pages
                times[label].append((many, one, rest))
        limits.probe(set(), {runner.weights for _, runner in ours.values()})
    rows = []
    for label, (model, runner) in ours.items():
        many, one, rest = (statistics.median(column) for column in zip(*times[label], strict=True))
        rate = together[label] * length / many
        share = rate * prefill_flops(models[model].config, length) / limits.gemm
        rows.append(Prefill(label, runner.name, together[label], length, rate, share, forks, (one + rest) / one))
    return rows
