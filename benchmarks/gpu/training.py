"""The state-space scan forward and backward: the fused kernels, torch, and fla-core where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import DEVICE, DRY, HALF, Results, seconds_of

from thinkfast.ops.ssd import ssd_chunked
from thinkfast.ops.triton.scan import ssd_fused


def training(results: Results) -> None:
    """Seconds and peak memory of the scan, forward and backward, in one layer of the shapes of 1B and 3B."""
    for heads, width in [(2, 5)] if DRY else [(32, 64), (24, 128)]:
        batch, length = (1, 19) if DRY else (8, 2048)
        leaves = {
            "x": torch.randn(batch, length, heads, width, device=DEVICE),
            "dt": torch.rand(batch, length, heads, device=DEVICE) * 0.1,
            "A": -torch.rand(heads, device=DEVICE) * 15 - 1,
            "B": torch.randn(batch, length, heads, width, device=DEVICE),
            "C": torch.randn(batch, length, heads, width, device=DEVICE),
            "D": torch.randn(heads, device=DEVICE),
        }
        for name, scan in scans():
            if not results.missing(scan=name, heads=heads, head_dim=width):
                continue
            for tensor in leaves.values():
                tensor.requires_grad_().grad = None

            def forward(scan: Callable[..., Any] = scan, leaves: dict[str, torch.Tensor] = leaves) -> torch.Tensor:
                return scan(**leaves)[0]

            def both(forward: Callable[[], torch.Tensor] = forward) -> None:
                forward().sum().backward()

            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                row: dict[str, object] = {"forward_backward_seconds": seconds_of(both, 3 if DRY else 9)}
                with torch.no_grad():
                    row["forward_seconds"] = seconds_of(forward, 3 if DRY else 9)
                row["peak_bytes"] = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
            except Exception as failed:  # noqa: BLE001 - one variant that does not compile must not lose the others
                row = {"failed": " ".join(str(failed).split())[:300]}
            results.add(scan=name, heads=heads, head_dim=width, batch=batch, length=length, **row)


def scans() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The scans to compare, by name."""
    yield "torch", ssd_chunked
    for precision in ("tf32", "tf32x3", "ieee"):
        for chunk in (64,) if DRY else (64, 32):
            yield (
                f"fused {precision}, chunks of at most {chunk}",
                lambda precision=precision, chunk=chunk, **t: ssd_fused(**t, precision=precision, chunk=chunk),
            )
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception:  # noqa: BLE001 - without a GPU its import fails in many ways
        return

    def fla(**t: torch.Tensor) -> tuple[torch.Tensor, object]:
        x, dt = t["x"], t["dt"]
        q, k, v = (part.to(HALF) for part in (t["C"], t["B"], dt[..., None] * x))
        y, last = chunk_simple_gla(q, k, v, dt * t["A"], scale=1.0, output_final_state=True)
        return y + t["D"][:, None] * x, last

    if DEVICE.type == "cuda":
        yield "fla-core", fla
