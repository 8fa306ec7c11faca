"""What a decoder remembers between calls: keys and values of attention layers, states of Mamba layers.

Rows are independent: each has its own length, so a batch may be ragged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinkfast.model.config import ATTENTION, DecoderConfig, MambaConfig


class AttentionCache:
    """Keys and values (B, KVH, capacity, P) and the number of tokens held by each row, `lengths` (B,)."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, KVH, L, P) behind each row's tokens; returns the filled prefix of keys and values.

        Raises ValueError when a row would outgrow the capacity.
        """
        batch, _, length, _ = k.shape
        longest = int(self.lengths.max()) + length
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit a cache of {self.capacity}")
        rows = torch.arange(batch, device=k.device)[:, None].expand(batch, length)
        slots = self.lengths[:, None] + torch.arange(length, device=k.device)
        self.keys[rows, :, slots] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[rows, :, slots] = v.transpose(1, 2).to(self.values.dtype)
        self.lengths += length
        return self.keys[:, :, :longest], self.values[:, :, :longest]

    def copy_rows(self, source: AttentionCache, source_rows: Tensor, rows: Tensor) -> None:
        """Forks rows of `source` into rows of this cache."""
        if not len(rows):
            return
        held = int(source.lengths[source_rows].max())
        self.keys[rows, :, :held] = source.keys[source_rows, :, :held]
        self.values[rows, :, :held] = source.values[source_rows, :, :held]
        self.lengths[rows] = source.lengths[source_rows]


class MambaCache:
    """The last d_conv - 1 inputs of the convolution (B, conv_dim, d_conv - 1) and the state (B, H, P, N) in float32."""

    def __init__(self, conv: Tensor, state: Tensor) -> None:
        self.conv, self.state = conv, state

    def copy_rows(self, source: MambaCache, source_rows: Tensor, rows: Tensor) -> None:
        """Forks rows of `source` into rows of this cache."""
        self.conv[rows] = source.conv[source_rows]
        self.state[rows] = source.state[source_rows]


LayerCache = AttentionCache | MambaCache


@dataclass(slots=True)
class Cache:
    """One layer cache a layer."""

    layers: list[LayerCache]

    def copy_rows(self, source: Cache, source_rows: Tensor, rows: Tensor) -> None:
        """Forks rows of `source` into rows of this cache, every layer."""
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            if isinstance(mine, AttentionCache) and isinstance(theirs, AttentionCache):
                mine.copy_rows(theirs, source_rows, rows)
                continue
            if not (isinstance(mine, MambaCache) and isinstance(theirs, MambaCache)):
                raise ValueError("the two caches belong to models with different layers")
            mine.copy_rows(theirs, source_rows, rows)


def new_cache(
    config: DecoderConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` tokens; `dtype` is that of keys and values."""
    layers: list[LayerCache] = []
    for kind in config.layer_types:
        if kind == ATTENTION:
            shape = (batch, config.num_kv_heads, capacity, config.head_dim)
            lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            layers.append(
                AttentionCache(
                    torch.zeros(shape, dtype=dtype, device=device),
                    torch.zeros(shape, dtype=dtype, device=device),
                    lengths,
                )
            )
        else:
            layers.append(empty_mamba_cache(config.mamba, batch, device))
    return Cache(layers)


def empty_mamba_cache(mamba: MambaConfig | None, batch: int, device: torch.device | str) -> MambaCache:
    """A zero state of one Mamba layer."""
    if mamba is None:
        raise ValueError("the configuration has no mamba shape")
    conv = torch.zeros(batch, mamba.conv_dim, mamba.d_conv - 1, dtype=torch.float32, device=device)
    state = torch.zeros(batch, mamba.n_heads, mamba.head_dim, mamba.d_state, dtype=torch.float32, device=device)
    return MambaCache(conv, state)
