"""What this machine can do, measured, and the time a decoded token takes at least on it."""

from __future__ import annotations

import mmap
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from thinkfast.model.config import ATTENTION, DecoderConfig

GEMM_SIZE = 512
SPIN = 0.03  # seconds for which threads of OpenMP may go on looking for work, on cores that others want
MIN_BUFFER, MAX_BUFFER = 1 << 20, 1 << 28
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Limits:
    """The rates of this machine, measured again and again between what is compared with them.

    A machine that is shared changes its pace by a third within seconds. Medians of what took turns meet the same paces,
    so a median time is compared with median rates and the fastest time with the best rates.
    """

    def __init__(self) -> None:
        self.products: list[float] = []
        self.reads: dict[int, list[float]] = {}
        self._buffers: dict[int, torch.Tensor] = {}

    def probe(self, sizes: set[int], weights: set[str], seconds: float = 0.05) -> None:
        """Measures once more, in the faster of the weights' dtypes and float32, over buffers of `sizes` bytes."""
        self.products.append(max(gemm_rate(seconds, getattr(torch, dtype)) for dtype in {"float32", *weights}))
        for size in sizes:
            if size not in self._buffers:
                self._buffers[size] = _buffer(size)
            self.reads.setdefault(size, []).append(_read(self._buffers[size], seconds))
        time.sleep(SPIN)

    @property
    def gemm(self) -> float:
        """Floating-point operations a second, the median."""
        return statistics.median(self.products)

    @property
    def bandwidth(self) -> dict[int, float]:
        """Bytes a second from buffers of so many bytes, the medians."""
        return {size: statistics.median(rates) for size, rates in self.reads.items()}

    def floor(self, touched: float, flops: float, batch: int, best: bool = False) -> float:
        """Seconds a token takes at least: `touched` bytes and `flops` of one row of `batch`; at the best rates seen or
        the median ones."""
        of = max if best else statistics.median
        return max(touched / of(self.reads[buffer_size(touched * batch)]), flops / of(self.products))


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


def flops_per_token(config: DecoderConfig, context: float) -> float:
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


def prefill_flops(config: DecoderConfig, length: int) -> float:
    """Of one token of a prompt: no logits, and half the prompt as context on average."""
    return flops_per_token(config, (length + 1) / 2) - 2.0 * config.vocab_size * config.hidden_size


def bytes_per_token(
    config: DecoderConfig, batch: int, context: int, kv_dtype: str, weights: str = "float32", shared: int = 0
) -> float:
    """Keys and values read, states read and written, and the row's part of the weights, which a step reads once.

    `shared` of the `context` tokens belong to a prompt that all rows have in common and are read once as well.
    """
    total = float(ELEMENT_BYTES[weights]) * weight_count(config) / batch
    tokens = context - shared + shared / batch
    for kind in config.layer_types:
        if kind == ATTENTION:
            total += 2.0 * config.num_kv_heads * config.head_dim * tokens * ELEMENT_BYTES[kv_dtype]
        elif config.mamba is not None:
            total += 2.0 * 4.0 * config.mamba.d_inner * config.mamba.d_state
    return total


def gemm_rate(seconds: float = 0.2, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a matrix product with the current number of threads."""
    a, b = torch.rand(GEMM_SIZE, GEMM_SIZE).to(dtype), torch.rand(GEMM_SIZE, GEMM_SIZE).to(dtype)
    out = torch.empty(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    return 2.0 * GEMM_SIZE**3 / _typical(lambda: torch.mm(a, b, out=out), seconds)


def read_bandwidth(size: int, seconds: float = 0.2) -> float:
    """Bytes a second read from a buffer of `size` bytes with the current number of threads."""
    return _read(_buffer(size), seconds)


def _buffer(size: int) -> torch.Tensor:
    """Ones in memory as large pages where the system has them, as the kernels' own memory is."""
    room = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.float32).fill_(1.0)


def _read(buffer: torch.Tensor, seconds: float) -> float:
    return buffer.nbytes / _typical(lambda: torch.sum(buffer), seconds)


def buffer_size(size: float) -> int:
    """The power of two next to `size`, within what is worth measuring."""
    return int(min(max(2 ** round(np.log2(size)), MIN_BUFFER), MAX_BUFFER))


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


def _typical(call: Callable[[], object], seconds: float) -> float:
    """The median time of a call."""
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
