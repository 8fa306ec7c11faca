"""Triton kernels for NVIDIA GPUs. Nothing here is imported before a model stands on one."""

from __future__ import annotations

import importlib.util

import torch


def usable(device: torch.device) -> bool:
    """Whether kernels can run on tensors of `device`: a GPU, and Triton installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
