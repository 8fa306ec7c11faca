"""Triton kernels for NVIDIA GPUs. Nothing here is imported before a model stands on one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from thinkfast.ops.ssd import ssd_chunked


def usable(device: torch.device) -> bool:
    """Whether kernels run on tensors of `device` as they should: a GPU, and Triton installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def runs(device: torch.device) -> bool:
    """Whether kernels run on tensors of `device` at all: also on a CPU, slowly, under Triton's TRITON_INTERPRET=1."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return usable(torch.device("cuda") if interpreted else device)


def chunked_scan(like: Tensor, width: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan for a mixer whose input is `like` and whose heads and states have at most `width` channels: the kernel
    of `thinkfast.ops.triton.scan` on a GPU, else `ssd_chunked`."""
    if not usable(like.device):
        return ssd_chunked
    from thinkfast.ops.triton.scan import MAX_WIDTH, ssd_fused

    if width > MAX_WIDTH:
        return ssd_chunked
    # Three products in tf32 keep float32's digits; inputs in two bytes lose nothing in one.
    return partial(ssd_fused, precision="tf32x3" if like.dtype == torch.float32 else "tf32")
