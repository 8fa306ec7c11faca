"""Decoded tokens per second over batch and context, and the floor that memory and arithmetic set."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from thinkfast.engine.backends import Backend, Memory, open_backend
from thinkfast.engine.sampling import SamplingParams, sample_key
from thinkfast.engine.slots import SlotTable
from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder

GEMM_SIZE = 512
MIN_BUFFER, MAX_BUFFER = 1 << 20, 1 << 28
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Speed:
    """One model at one batch and context. Times are medians; `share` is floor over measured time.

    The floor of a token is the larger of its bytes at the machine's measured read bandwidth (for a buffer as large as
    what a step touches) and its floating-point operations at the machine's measured rate of matrix products.
    """

    model: str
    batch: int
    context: int
    tokens_per_second: float
    microseconds_per_token: float
    fastest_microseconds_per_token: float
    bytes_per_token: float
    flops_per_token: float
    floor_microseconds_per_token: float
    share: float


def decode_speeds(
    models: Mapping[str, Decoder],
    batches: Sequence[int] = (1, 16, 128),
    contexts: Sequence[int] = (64, 256, 1000),
    *,
    steps: int = 8,
    repeats: int = 9,
    backend: str = "auto",
    kv_dtype: str = "auto",
    temperature: float = 0.8,
) -> dict[str, object]:
    """Measures every model at every batch and context, sampling included, and returns {"machine": ..., "rows": [...]}.

    The models take turns `repeats` times, `steps` decoding steps each, so that a change of the machine's pace meets all
    of them. Slots hold the state behind a random prompt; context is the number of tokens a step sees at the middle of
    the measurement. A row is a `Speed` as a dictionary. Raises BadInput where a context leaves no room.
    """
    if steps < 1 or repeats < 1:
        raise BadInput(f"steps is {steps} and repeats is {repeats}, expected 1 or more of each")
    backends = {name: open_backend(model, backend, kv_dtype) for name, model in models.items()}
    rate = gemm_rate()
    bandwidths: dict[int, float] = {}
    rows = []
    for batch in batches:
        for context in contexts:
            runs = {
                name: _Run(backends[name], models[name].config, batch, context, steps, temperature) for name in models
            }
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(repeats):
                for name, run in runs.items():
                    times[name].append(run.turn() / (steps * batch))
            for name in models:
                config, opened = models[name].config, backends[name]
                touched, flops = (
                    bytes_per_token(config, batch, context, opened.kv_dtype),
                    flops_per_token(config, context),
                )
                size = _buffer(touched * batch)
                bandwidths[size] = bandwidths.get(size) or read_bandwidth(size)
                floor, median = max(touched / bandwidths[size], flops / rate), statistics.median(times[name])
                fastest = min(times[name])
                speed = (1 / median, median * 1e6, fastest * 1e6, touched, flops, floor * 1e6, floor / median)
                rows.append(asdict(Speed(name, batch, context, *speed)))
    machine = {
        **describe_machine(),
        "backend": {name: opened.name for name, opened in backends.items()},
        "kv_dtype": {name: opened.kv_dtype for name, opened in backends.items()},
        "gemm_gflops": rate / 1e9,
        "read_gigabytes_per_second": {str(size): value / 1e9 for size, value in sorted(bandwidths.items())},
    }
    return {"machine": machine, "rows": rows}


def weight_count(config: DecoderConfig) -> int:
    """Weights that one decoded token is multiplied with: all matrices, the head included, the embedding not."""
    count = config.vocab_size * config.hidden_size
    for kind in config.layer_types:
        count += 3 * config.hidden_size * config.intermediate_size
        if kind == ATTENTION:
            count += 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
        elif config.mamba is not None:
            count += config.hidden_size * (config.mamba.in_proj_rows + config.mamba.d_inner)
    return count


def flops_per_token(config: DecoderConfig, context: int) -> float:
    """Two a multiply-add: matrices, scores and weighted values, state update and output."""
    flops = 2.0 * weight_count(config)
    for kind in config.layer_types:
        if kind == ATTENTION:
            flops += 4.0 * config.num_heads * config.head_dim * context
        elif config.mamba is not None:
            flops += (
                config.mamba.d_inner * 5.0 * config.mamba.d_state + 2.0 * config.mamba.conv_dim * config.mamba.d_conv
            )
    return flops


def bytes_per_token(config: DecoderConfig, batch: int, context: int, kv_dtype: str) -> float:
    """Keys and values read, states read and written, and the row's part of the float32 weights read once a step."""
    total = 4.0 * weight_count(config) / batch
    for kind in config.layer_types:
        if kind == ATTENTION:
            total += 2.0 * config.num_kv_heads * config.head_dim * context * ELEMENT_BYTES[kv_dtype]
        elif config.mamba is not None:
            total += 2.0 * 4.0 * config.mamba.d_inner * config.mamba.d_state
    return total


def gemm_rate(seconds: float = 0.2) -> float:
    """Floating-point operations a second of a float32 matrix product with the current number of threads."""
    a, b = torch.rand(GEMM_SIZE, GEMM_SIZE), torch.rand(GEMM_SIZE, GEMM_SIZE)
    out = torch.empty(GEMM_SIZE, GEMM_SIZE)
    return 2.0 * GEMM_SIZE**3 / _fastest(lambda: torch.mm(a, b, out=out), seconds)


def read_bandwidth(size: int, seconds: float = 0.2) -> float:
    """Bytes a second read from a buffer of `size` bytes with the current number of threads."""
    buffer = torch.ones(size // 4)
    return size / _fastest(lambda: torch.sum(buffer), seconds)


def describe_machine() -> dict[str, object]:
    """Processor, threads and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line[:10] == "model name"
        ]
        name = models[0] if models else name
    return {
        "cpu": name,
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class _Run:
    """Slots of one model, ready to decode at one batch and context."""

    def __init__(
        self, backend: Backend, config: DecoderConfig, batch: int, context: int, steps: int, temperature: float
    ) -> None:
        first = context - steps // 2 - 1
        if first < 1:
            raise BadInput(f"context is {context}, expected at least {steps // 2 + 2} for {steps} steps around it")
        params = SamplingParams(max_tokens=steps + 1, temperature=temperature, ignore_eos=True)
        self.memory: Memory = backend.memory(batch, first + steps + 1)
        self.table = SlotTable(batch, params, config.vocab_size, ())
        self.rows, self.steps = np.arange(batch, dtype=np.int32), steps
        self.prompt = np.random.default_rng(context).integers(0, config.vocab_size, first).tolist()
        self.kept = self.memory.prefill([self.prompt[:-1]])[0]

    def turn(self) -> float:
        """Seconds that `steps` steps take, behind one untimed step that touches the pages and warms the caches."""
        for slot in self.rows.tolist():
            self.memory.fork(self.kept, slot)
            self.table.admit(slot, (0, slot), self.prompt[-1], len(self.prompt) - 1, sample_key(0, slot), 0.0)
        self._step()
        start = time.perf_counter()
        for _ in range(self.steps):
            self._step()
        return time.perf_counter() - start

    def _step(self) -> None:
        self.table.advance(self.rows, *self.memory.step(self.table, self.rows))


def _buffer(size: float) -> int:
    """The power of two next to `size`, within what is worth measuring."""
    return int(min(max(2 ** round(np.log2(size)), MIN_BUFFER), MAX_BUFFER))


def _fastest(call: Callable[[], object], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
