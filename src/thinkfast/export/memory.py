"""What a model takes when it is served: weights, and by sequence keys and values, states, and vLLM's pages of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig

KIB, MIB, GIB = 2**10, 2**20, 2**30
UNITS = {GIB: "GiB", MIB: "MiB", KIB: "KiB"}
BLOCK = 16
HALF, SINGLE = 2, 4
CARDS = (24, 80, 141)
CONTEXTS = (1024, 4096, 16384)
USED = 0.9  # vLLM's --gpu-memory-utilization by default
WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "q8_0": 34 / 32}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in the layout of an export, a pure model's inert layer included; keys and values in two bytes a number.

    `kv_token`: of one token in one attention layer. `state`: of one sequence in one Mamba layer, in the dtype asked
    for; `conv`: its convolution's, in two bytes a number. `block`: tokens of a page in vLLM, which makes pages of
    attention as large as one Mamba state.
    """

    parameters: int
    attention_layers: int
    mamba_layers: int
    kv_token: int
    state: int
    conv: int
    block: int

    def sequence(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens, in whole pages."""
        blocks = -(-context // self.block)
        page = self.block * self.kv_token
        states = page if self.attention_layers else self.state + self.conv
        return self.attention_layers * blocks * page + self.mamba_layers * states

    def sequences(self, memory: float, weights: float, context: int) -> int:
        """Sequences of `context` tokens that fit beside the weights."""
        return max(0, int((USED * memory - weights) // self.sequence(context)))


def memory_of(config: DecoderConfig, state_bytes: int = SINGLE) -> Memory:
    """The sizes of an export of `config` with a recurrent state of `state_bytes` a number."""
    kinds, mamba = config.layer_types, config.mamba
    if MAMBA in kinds and ATTENTION not in kinds:
        kinds = (*kinds, ATTENTION)
    attention, recurrent = kinds.count(ATTENTION), kinds.count(MAMBA)
    kv_token = 2 * config.num_kv_heads * config.head_dim * HALF
    state = conv = 0
    if mamba is not None and recurrent:
        state = mamba.n_heads * mamba.head_dim * mamba.d_state * state_bytes
        conv = mamba.conv_dim * (mamba.d_conv - 1) * HALF
    block = max(BLOCK, -(-(state + conv) // (kv_token * BLOCK)) * BLOCK)
    return Memory(_parameters(config, kinds), attention, recurrent, kv_token, state, conv, block)


def _parameters(config: DecoderConfig, kinds: tuple[str, ...]) -> int:
    hidden, mamba = config.hidden_size, config.mamba
    count = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    for kind in kinds:
        count += 2 * hidden + 3 * hidden * config.intermediate_size
        if kind == ATTENTION or mamba is None:
            count += 2 * hidden * config.head_dim * (config.num_heads + config.num_kv_heads)
            count += config.head_dim * (config.num_heads + 2 * config.num_kv_heads) if config.qkv_bias else 0
            count += 2 * config.head_dim if config.qk_norm else 0
        else:
            count += hidden * (mamba.in_proj_rows + mamba.d_inner) + mamba.conv_dim * (mamba.d_conv + 1)
            count += 3 * mamba.n_heads + mamba.d_inner
    return count


def plan(config: DecoderConfig, dtype: str) -> tuple[dict[str, Any], str]:
    """The sizes as a document and in words, with the sequences that fit on cards of some sizes."""
    single, half = memory_of(config), memory_of(config, HALF)
    weights = single.parameters * WEIGHT_BYTES[dtype]
    limit = config.max_position_embeddings
    contexts = [context for context in CONTEXTS if context <= limit] or [limit]
    fits = {
        str(card): {str(context): single.sequences(card * GIB, weights, context) for context in contexts}
        for card in CARDS
    }
    document: dict[str, Any] = {
        "parameters": single.parameters,
        "dtype": dtype,
        "weight_bytes": int(weights),
        "attention_layers": single.attention_layers,
        "mamba_layers": single.mamba_layers,
        "kv_bytes_token_layer": single.kv_token,
        "state_bytes_layer": {"float32": single.state, "bfloat16": half.state},
        "conv_bytes_layer": single.conv,
        "vllm_block_tokens": {"float32": single.block, "bfloat16": half.block},
        "sequence_bytes": {str(context): single.sequence(context) for context in contexts},
        "max_num_seqs": fits,
    }
    lines = [
        f"weights            {single.parameters / 1e6:,.1f}M parameters, {_size(weights)} in {dtype}",
        f"attention          {_layers(single.attention_layers)}, {_size(single.kv_token)} a token and layer",
    ]
    if single.mamba_layers:
        lines += [
            f"recurrent state    {_layers(single.mamba_layers)}, {_size(single.state)} a sequence and layer "
            f"in float32, {_size(half.state)} in bfloat16, and {_size(single.conv)} of the convolution",
            f"vLLM's block       {single.block} tokens with a float32 state, {half.block} with a bfloat16 one",
        ]
    lines.append("one sequence       " + _row(f"{_size(single.sequence(c))} at {c:,} tokens" for c in contexts))
    for card, counts in fits.items():
        lines.append(f"on {card:>3} GiB         " + _row(f"{n:,} at {int(context):,}" for context, n in counts.items()))
    return document, "\n".join(lines)


def _size(count: float) -> str:
    """Bytes in the largest unit of which there is one."""
    unit = next((size for size in UNITS if count >= size), KIB)
    return f"{count / unit:.4g} {UNITS[unit]}"


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _row(parts: Iterable[str]) -> str:
    return ", ".join(parts)
