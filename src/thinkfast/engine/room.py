"""How much memory slots and prompts take, and how many of them a budget of bytes holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig

BLOCK = 32  # the native kernels pad heads to it and keep tokens in pages of so many
HISTORY_BYTES = 12  # a drawn token: its id and its log-probability
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Plan:
    """Slots decoded at once, and the bytes beside them for the states of prompts."""

    slots: int
    kept: int


def kept_bytes(config: DecoderConfig, tokens: int, kv_dtype: str) -> int:
    """Bytes that one sequence of `tokens` tokens is remembered in: keys and values, float32 states, last inputs."""
    padded = -(-tokens // BLOCK) * BLOCK
    total = 0
    for kind in config.layer_types:
        if kind == ATTENTION:
            width = -(-config.head_dim // BLOCK) * BLOCK * config.num_kv_heads
            total += 2 * width * padded * ELEMENT_BYTES[kv_dtype]
        elif config.mamba is not None:
            mamba = config.mamba
            total += 4 * (mamba.d_inner * mamba.d_state + mamba.conv_dim * (mamba.d_conv - 1))
    return total


def machine_bytes(device: torch.device) -> int:
    """Memory of the machine, or what is free of the device's own."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan(
    slots: int, capacity: int, each: int, kept: int, room: int, *, fewer: bool = False, lazy: bool = False
) -> Plan:
    """What fits into `room` bytes of slots of `each` bytes, for `capacity` tokens, and prompts of at most `kept` bytes.

    A prompt that is being fed and one that is kept are always provided for. Where not all slots fit, `fewer` takes as
    many as do and `lazy` all of them, for memory that is only taken when touched. Raises BadInput otherwise, and where
    not one request fits.
    """
    fit = (room - 2 * kept) // each
    if fit < 1:
        needed = _size(each + 2 * kept)
        raise BadInput(f"one request of {capacity} tokens takes {needed}, expected at most the memory of {_size(room)}")
    if fit < slots and not (fewer or lazy):
        raise BadInput(
            f"{slots} slots of {capacity} tokens take {_size(slots * each + 2 * kept)}, "
            f"expected at most the {_size(room)} of this machine: {fit} slots fit"
        )
    if lazy and not fewer:
        return Plan(slots, room)
    return Plan(min(fit, slots), room - min(fit, slots) * each)


def _size(count: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
