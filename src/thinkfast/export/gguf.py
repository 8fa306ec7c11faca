"""A model as a GGUF file that llama.cpp runs: architecture granitehybrid, or llama where every layer is attention."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinkfast.errors import BadInput
from thinkfast.export.vocabulary import add_vocabulary
from thinkfast.model.checkpoint import load_model
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.layers import rope_frequencies
from thinkfast.model.layout import check_stock

if TYPE_CHECKING:
    import gguf

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
LARGEST = {"float16": 65504.0, "q8_0": 127 * 65504.0}
WIDTH = 2  # llama.cpp asserts that a Mamba layer is twice as wide as the model
Named = Iterator[tuple[str, Tensor]]


def export_gguf(source: Path, out: Path, dtype: str | None = None) -> dict[str, Any]:
    """Writes `source` to the new file `out`; returns its path, dtype and warnings.

    dtype: "float32", "float16", "bfloat16" (the default) or "q8_0" of the matrices; vectors and convolutions are
    float32, and so are, with q8_0, matrices whose rows are no multiple of 32. Narrower mixers are padded with heads
    that give zero. Raises BadInput for what llama.cpp cannot express or an `out` that exists.
    """
    kind = gguf_dtype(dtype)
    if out.exists():
        raise BadInput(f"{out} exists, expected a new file")
    try:
        import gguf
    except ImportError:
        raise BadInput("the package gguf is not installed: pip install 'thinkfast[export]'") from None
    model = load_model(source)
    config = expressible(model.config, source)
    staging = out.with_name(f".{out.name}.part")
    writer = gguf.GGUFWriter(staging, "granitehybrid" if MAMBA in config.layer_types else "llama")
    _add_keys(writer, config, out.stem, gguf.LlamaFileType[("ALL_" if kind == "float32" else "MOSTLY_") + TYPES[kind]])
    warnings = add_vocabulary(writer, source, config)
    for name, tensor in tensors(model, config):
        if not bool((tensor.abs() <= LARGEST.get(kind, torch.finfo(torch.float32).max)).all()):
            raise BadInput(f"{name} holds values that are not finite in {kind}, choose another dtype")
        _add_tensor(writer, name, tensor.detach().float().numpy(), gguf.GGMLQuantizationType[TYPES[kind]])
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        staging.rename(out)
    finally:
        writer.close()
        staging.unlink(missing_ok=True)
    return {"out": str(out), "format": "gguf", "dtype": kind, "warnings": warnings}


def gguf_dtype(name: str | None) -> str:
    """One of TYPES, bfloat16 where none is named. Raises BadInput for another name."""
    if name is not None and name not in TYPES:
        raise BadInput(f"dtype is {name!r}, expected one of {', '.join(TYPES)} for the format gguf")
    return name or "bfloat16"


def expressible(config: DecoderConfig, source: Path) -> DecoderConfig:
    """The shape that is written: a pure model's inert attention layer added, Mamba layers twice as wide as the model.

    Raises BadInput for a shape that llama.cpp has not got.
    """
    mamba = config.mamba
    if config.qk_norm and MAMBA not in config.layer_types:
        raise BadInput(
            f"{source}: queries and keys are normed, which this writer does not express: "
            "llama.cpp's own converter reads the directory as it is"
        )
    check_stock(config, f"{source}: ")
    if MAMBA not in config.layer_types or mamba is None:
        return config
    if mamba.d_inner not in (config.hidden_size, WIDTH * config.hidden_size):
        raise BadInput(
            f"{source}: a Mamba layer is {mamba.d_inner} wide, but llama.cpp runs those of {config.hidden_size} "
            f"(padded) and {WIDTH * config.hidden_size} alone"
        )
    kinds = config.layer_types if ATTENTION in config.layer_types else (*config.layer_types, ATTENTION)
    times = WIDTH * config.hidden_size // mamba.d_inner
    wide = MambaConfig(
        mamba.n_heads * times, mamba.head_dim, mamba.d_state, mamba.n_groups * times, mamba.d_conv, mamba.chunk_size
    )
    return config.with_layers(kinds, wide)


def tensors(model: Decoder, config: DecoderConfig) -> Named:
    """Names and float tensors of the file; `config` is `expressible(model.config)`."""
    yield "token_embd.weight", model.embed_tokens.weight
    yield "output_norm.weight", model.norm.weight
    if model.lm_head is not None:
        yield "output.weight", model.lm_head.weight
    if config.rope_scaling is not None:
        plain = rope_frequencies(config.head_dim, config.rope_theta, None)
        yield "rope_freqs.weight", plain / rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    for index, layer in enumerate(model.layers):
        prefix, state = f"blk.{index}", layer.state_dict()
        yield f"{prefix}.attn_norm.weight", state["input_layernorm.weight"]
        yield f"{prefix}.ffn_norm.weight", state["post_attention_layernorm.weight"]
        for name in ("gate", "up", "down"):
            yield f"{prefix}.ffn_{name}.weight", state[f"mlp.{name}_proj.weight"]
        if config.layer_types[index] == ATTENTION:
            yield from _attention(state, prefix, config)
        elif model.config.mamba is not None and config.mamba is not None:
            yield from _mamba(state, prefix, model.config.mamba, config.mamba)
    if config.num_layers > model.config.num_layers:
        yield from _inert(f"blk.{config.num_layers - 1}", config)


def _attention(state: dict[str, Tensor], prefix: str, config: DecoderConfig) -> Named:
    for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
        yield f"{prefix}.attn_{letter}.weight", _interleaved(state[f"mixer.{letter}_proj.weight"], heads)
        if config.qkv_bias:
            yield f"{prefix}.attn_{letter}.bias", _interleaved(state[f"mixer.{letter}_proj.bias"], heads)
    yield f"{prefix}.attn_v.weight", state["mixer.v_proj.weight"]
    if config.qkv_bias:
        yield f"{prefix}.attn_v.bias", state["mixer.v_proj.bias"]
    yield f"{prefix}.attn_output.weight", state["mixer.o_proj.weight"]


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * P, ...), where channel i turns with i + P/2, in the order where 2 i turns with 2 i + 1."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _mamba(state: dict[str, Tensor], prefix: str, own: MambaConfig, wide: MambaConfig) -> Named:
    """A Mamba layer, padded with zeros from the shape `own` to `wide`: heads that neither read nor write."""
    by_state = (own.n_groups * own.d_state, wide.n_groups * wide.d_state)
    channels = ((own.d_inner, wide.d_inner), by_state, by_state)
    heads = (own.n_heads, wide.n_heads)
    projected = ((own.d_inner, wide.d_inner), *channels, heads)
    yield f"{prefix}.ssm_in.weight", _padded(state["mixer.in_proj.weight"], *projected)
    yield f"{prefix}.ssm_conv1d.weight", _padded(state["mixer.conv1d.weight"].squeeze(1), *channels)
    yield f"{prefix}.ssm_conv1d.bias", _padded(state["mixer.conv1d.bias"], *channels)
    yield f"{prefix}.ssm_dt.bias", _padded(state["mixer.dt_bias"], heads)
    yield f"{prefix}.ssm_a", _padded(-torch.exp(state["mixer.A_log"].float()), heads)[:, None]
    yield f"{prefix}.ssm_d", _padded(state["mixer.D"], heads)[:, None]
    norm = _padded(state["mixer.norm.weight"], (own.d_inner, wide.d_inner))
    yield f"{prefix}.ssm_norm.weight", norm.view(wide.n_groups, -1)
    out = state["mixer.out_proj.weight"]
    yield f"{prefix}.ssm_out.weight", _padded(out.t(), (own.d_inner, wide.d_inner)).t()


def _padded(rows: Tensor, *parts: tuple[int, int]) -> Tensor:
    """Rows in parts of (length, wanted length), each filled up with zeros."""
    pieces = []
    for part, (length, wanted) in zip(torch.split(rows, [length for length, _ in parts]), parts, strict=True):
        pieces += [part, rows.new_zeros(wanted - length, *rows.shape[1:])]
    return torch.cat(pieces)


def _inert(prefix: str, config: DecoderConfig) -> Named:
    """An attention layer that adds zero: llama.cpp aborts without one."""
    hidden, wide, inner = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    narrow = config.num_kv_heads * config.head_dim
    for name in ("attn_norm", "ffn_norm"):
        yield f"{prefix}.{name}.weight", torch.ones(hidden)
    matrices = {"attn_q": (wide, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden)}
    matrices |= {"attn_output": (hidden, wide), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    for name, shape in (matrices | {"ffn_down": (hidden, inner)}).items():
        yield f"{prefix}.{name}.weight", torch.zeros(shape)


def _add_keys(writer: gguf.GGUFWriter, config: DecoderConfig, name: str, file_type: int) -> None:
    mamba = config.mamba if MAMBA in config.layer_types else None
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    kv_heads = [config.num_kv_heads if kind == ATTENTION else 0 for kind in config.layer_types]
    writer.add_head_count_kv(kv_heads if mamba else config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    if mamba is None:
        return
    writer.add_attention_scale(config.head_dim**-0.5)
    writer.add_embedding_scale(1.0)
    writer.add_residual_scale(1.0)
    writer.add_logit_scale(1.0)
    writer.add_rope_scaling_finetuned(config.rotary_dim != 0)  # in this architecture the switch of rotary embedding
    writer.add_ssm_conv_kernel(mamba.d_conv)
    writer.add_ssm_state_size(mamba.d_state)
    writer.add_ssm_group_count(mamba.n_groups)
    writer.add_ssm_inner_size(mamba.d_inner)
    writer.add_ssm_time_step_rank(mamba.n_heads)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], kind: gguf.GGMLQuantizationType
) -> None:
    import gguf

    matrix = values.ndim == 2 and values.shape[1] > 1 and not name.endswith(("ssm_conv1d.weight", "ssm_norm.weight"))
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if not matrix or values.shape[1] % block:
        kind = gguf.GGMLQuantizationType.F32
    stored = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
