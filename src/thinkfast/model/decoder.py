"""One lean decoder for teacher and student: norm -> mixer -> norm -> SwiGLU, where a mixer is attention or has a
state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinkfast.model.attention import Attention
from thinkfast.model.cache import AttentionCache, Cache, LayerCache, MambaCache
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.layers import RMSNorm, SwiGLU
from thinkfast.model.mixer import StateMixer, required
from thinkfast.model.mixers import MIXERS
from thinkfast.ops.cpu import training


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    mixer: Attention | StateMixer

    def __init__(self, config: DecoderConfig, kind: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = Attention(config) if kind == ATTENTION else MIXERS[required(config).kind](config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def mix(self, u: Tensor, cache: LayerCache | None = None, bounds: Tensor | None = None) -> Tensor:
        """The mixer's output for a normed input u (B, L, D)."""
        if isinstance(self.mixer, Attention):
            if isinstance(cache, MambaCache):
                raise ValueError("an attention layer was given the state of a Mamba layer")
            attended: Tensor = self.mixer(u, cache, bounds)
            return attended
        if isinstance(cache, AttentionCache):
            raise ValueError("a Mamba layer was given keys and values")
        mixed: Tensor = self.mixer(u, cache, bounds)
        return mixed

    def forward(self, x: Tensor, cache: LayerCache | None = None, bounds: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        if cache is None and isinstance(self.mixer, StateMixer):
            x = self.mixer.added(x, self.input_layernorm, bounds)
        else:
            x = x + self.mix(self.input_layernorm(x), cache, bounds)
        out: Tensor = self.mlp.added(x, self.post_attention_layernorm)
        return out

    def halves(self, x: Tensor) -> list[tuple[training.Half, list[Tensor]]]:
        """Both halves for the kernels for training, or none where these do not take the whole block."""
        if not isinstance(self.mixer, StateMixer):
            return []
        found = self.mixer.as_half(x, self.input_layernorm), self.mlp.as_half(x, self.post_attention_layernorm)
        return [half for half in found if half is not None] if None not in found else []


class Decoder(nn.Module):
    """Token ids (B, L) -> logits (B, L, vocab). With a `Cache` (see `new_cache`) it goes on from what that holds.

    `recompute`: the layers' activations are not kept for the backward pass but computed again (arXiv 1604.06174).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, kind) for kind in config.layer_types])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        untied = not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if untied else None

    @property
    def head_weight(self) -> Tensor:
        """The output projection, (vocab, D)."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, input_ids: Tensor, cache: Cache | None = None, bounds: Tensor | None = None) -> Tensor:
        """The states after the final norm, (B, L, D).

        `bounds` (documents + 1,), int64 on the CPU, from 0 to L: one row holds several documents one behind another,
        and convolution, state, attention and positions begin anew with each. Raises ValueError for bounds that do not
        fit the row, or beside a cache.
        """
        if bounds is not None:
            _check_bounds(bounds, input_ids, cache)
        x = self.embed_tokens(input_ids)
        recompute = self.recompute and torch.is_grad_enabled()
        halves: list[tuple[training.Half, list[Tensor]]] = []  # of layers that are still to come, in one call
        for index, layer in enumerate(self.layers):
            if cache is None and not recompute and isinstance(layer, Block) and (found := layer.halves(x)):
                halves += found
                continue
            x, halves = _through(x, halves, bounds), []
            if recompute:
                x = checkpoint(layer, x, None, bounds, use_reentrant=False)
            else:
                x = layer(x, None if cache is None else cache.layers[index], bounds)
        normed: Tensor = self.norm(_through(x, halves, bounds))
        return normed

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        return F.linear(self.hidden(input_ids, cache), self.head_weight)


def _through(x: Tensor, halves: list[tuple[training.Half, list[Tensor]]], bounds: Tensor | None) -> Tensor:
    if not halves:
        return x
    weights = [weight for _, own in halves for weight in own]
    return training.through(x, [half for half, _ in halves], weights, bounds)


def _check_bounds(bounds: Tensor, input_ids: Tensor, cache: Cache | None) -> None:
    """A kernel that is given other bounds would write behind its memory."""
    if cache is not None:
        raise ValueError("several documents in a row cannot follow a cache")
    ends = (int(bounds[0]), int(bounds[-1]))
    if input_ids.shape[0] != 1 or ends != (0, input_ids.shape[1]) or not bool((bounds.diff() > 0).all()):
        raise ValueError(f"bounds from {ends[0]} to {ends[1]} do not divide a batch of shape {tuple(input_ids.shape)}")
