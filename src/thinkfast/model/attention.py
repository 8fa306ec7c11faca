"""Grouped-query attention with rotary embedding and an optional cache (arXiv 2305.13245, 2104.09864); where the
configuration says so, with a bias on queries, keys and values, or with normed queries and keys (arXiv 2302.05442)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkfast.model.cache import AttentionCache
from thinkfast.model.config import DecoderConfig
from thinkfast.model.layers import RMSNorm, apply_rope, by_document, rope_frequencies
from thinkfast.ops.cpu import training


class Attention(nn.Module):
    """Causal attention; query head h reads key/value head h // (num_heads / num_kv_heads)."""

    frequency: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.rotary_dim)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, u: Tensor, cache: AttentionCache | None = None, bounds: Tensor | None = None) -> Tensor:
        """u (B, L, D) -> (B, L, D). With a cache the L tokens are appended at each row's own length; with `bounds` one
        row holds several documents, see `Decoder.hidden`."""
        batch, length, _ = u.shape
        v = self.v_proj(u).view(batch, length, self.num_kv_heads, self.head_dim)
        if cache is None:
            q, k = self._projected(u)
            if self.head_dim % (2 * training.BLOCK) == 0 and training.usable(u, v):
                angles = torch.arange(length, device=u.device)[:, None] * self.frequency
                y = training.attention(q, k, v, angles, bounds)
            else:
                y = by_document(self._attended, bounds, q, k, v)
            return self._out(y)
        positions = cache.lengths[:, None] + torch.arange(length, device=u.device)
        q, k = self.queries_keys(u, positions)
        keys, values = cache.append(k, v.transpose(1, 2))
        visible = torch.arange(keys.shape[2], device=u.device) <= positions[:, :, None]
        y = F.scaled_dot_product_attention(
            q, keys.to(q.dtype), values.to(q.dtype), attn_mask=visible[:, None], enable_gqa=True
        )
        return self._out(y.transpose(1, 2).reshape(batch, length, -1))

    def _out(self, y: Tensor) -> Tensor:
        out: Tensor = self.o_proj(y)
        return out

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What queries (B, L, H, P) read of keys and values (B, L, KVH, P), turned by their places -> (B, L, H * P)."""
        positions = torch.arange(q.shape[1], device=q.device)
        q, k = (apply_rope(x, positions, self.frequency).transpose(1, 2) for x in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    def queries_keys(self, u: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turned queries (B, H, L, P) and keys (B, KVH, L, P) of inputs u (B, L, D) at positions (B, L) or (L,)."""
        q, k = self._projected(u)
        q, k = (apply_rope(x, positions, self.frequency).transpose(1, 2) for x in (q, k))
        return q, k

    def _projected(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, L, H, P) and keys (B, L, KVH, P), normed where the teacher norms them."""
        batch, length, _ = u.shape
        q = self.q_proj(u).view(batch, length, self.num_heads, self.head_dim)
        k = self.k_proj(u).view(batch, length, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def matrix(self, u: Tensor) -> Tensor:
        """The weights with which query positions read key positions, (B, H, L, L), for inputs u (B, L, D)."""
        q, k = self.queries_keys(u, torch.arange(u.shape[1], device=u.device))
        repeats = self.num_heads // self.num_kv_heads
        scores = q.float() @ k.float().repeat_interleave(repeats, dim=1).transpose(-1, -2) * self.head_dim**-0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=u.device).triu(1)
        weights: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return weights
