"""What the steps of benchmarks/gpu.sh share: sizes, results on disk, the machine and its ceilings, shapes."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thinkfast.engine.gpu import AHEAD
from thinkfast.model.config import ATTENTION, DecoderConfig, MambaConfig, RopeScaling
from thinkfast.model.decoder import Decoder

DRY = "--dry" in sys.argv
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF, SINGLE = torch.bfloat16, torch.float32
BUDGET = 60.0 if DRY else 450.0
"""Seconds after which no new row is started; the shell's limit is 530."""
PROMPT, SHARING = (5, 2) if DRY else (512, 64)
"""Tokens of a prompt, and samples of each prompt."""
GENERATED = (8,) if DRY else (1024, 4096, 16384)
BATCHES = (2,) if DRY else (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
STEPS = 1 if DRY else AHEAD
SPARE = 6 * 2**30
"""Bytes of the device that caches leave to activations, graphs and the allocator."""


class Results:
    """Rows of one step, on disk after each of them; a row that is there is not measured again."""

    def __init__(self, folder: Path, step: str, about: str) -> None:
        self.path, self.started = folder / f"{step}.json", time.monotonic()
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows: list[dict[str, Any]] = old.get("rows", [])
        command = f"benchmarks/gpu.sh {step}{' --dry' if DRY else ''}"
        self.head = {"command": command, "what": about, "machine": old.get("machine") or machine()}
        self.skipped = False

    def missing(self, **key: object) -> bool:
        """Whether a row is to be measured now."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return False
        late = time.monotonic() - self.started > BUDGET
        self.skipped |= late
        return not late

    def add(self, **row: object) -> None:
        self.rows.append({**row, "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
        beside.replace(self.path)
        print(json.dumps(row), flush=True)


def machine() -> dict[str, object]:
    """Device, versions, and its two ceilings: bytes copied (read plus written) and bfloat16 products a second."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "copy_bytes_per_second": copy_rate(),
        "product_flops_per_second": product_rate(),
    }
    for name in ("triton", "transformers", "fla"):
        try:
            found[name] = str(__import__(name).__version__)
        except ImportError:
            found[name] = "not installed"
    if DEVICE.type == "cuda":
        found["gpu"], found["memory"] = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        found["cuda"] = torch.version.cuda
    else:
        found["gpu"] = "none: Triton's interpreter on the CPU, no figure means anything"
    return found


def seconds_of(call: Callable[[], object], repeats: int = 9) -> float:
    """The median of `repeats` calls after two that warm up."""
    times = []
    for at in range(repeats + 2):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        if at >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronise() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def copy_rate() -> float:
    """Bytes a second of a copy on the device, read plus written."""
    size = 1 << (20 if DRY else 32)
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source))


def product_rate() -> float:
    """Operations a second of a bfloat16 matrix product."""
    size = 64 if DRY else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=HALF) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b)


def teacher_config(size: str) -> DecoderConfig:
    """Llama-3.2-1B or -3B; with --dry two layers of the same kind."""
    wide = size.endswith("3b")
    hidden, heads, head_dim = (3072, 24, 128) if wide else (2048, 32, 64)
    config = DecoderConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=8192,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        layer_types=(ATTENTION,) * (28 if wide else 16),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
    )
    small = {"vocab_size": 70, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1}
    return replace(config, **small, head_dim=8, layer_types=(ATTENTION,) * 2) if DRY else config


def student_config(teacher: DecoderConfig, kept: int) -> DecoderConfig:
    """The teacher with Mamba-2 in all but `kept` evenly spread layers: a head's state is head_dim x head_dim."""
    stride = teacher.num_layers // kept if kept else 0
    kinds = tuple(
        ATTENTION if kept and index % stride == stride // 2 and index // stride < kept else "mamba"
        for index in range(teacher.num_layers)
    )
    mamba = MambaConfig(teacher.num_heads, teacher.head_dim, teacher.head_dim, teacher.num_heads)
    return teacher.with_layers(kinds, mamba)


def random_model(config: DecoderConfig, dtype: torch.dtype = HALF) -> Decoder:
    """A decoder with random weights on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Decoder(config).to(dtype).eval()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.05)
    return model
