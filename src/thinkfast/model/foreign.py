"""Which layout a config.json has, and the layouts that are read and not written: Bamba, Mamba-2 (of transformers and of
mamba_ssm) and Llamba.

Multipliers, missing positions and partial rotary embedding are folded into the weights on the way in, so that one
decoder computes them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DISCRETE, MAMBA, DecoderConfig, MambaConfig
from thinkfast.model.layout import (
    HYBRID,
    WRITTEN,
    Fields,
    check_no_limit,
    parse_eos,
    parse_mamba,
    parse_rope,
    parse_written,
)
from thinkfast.model.own import OWN, parse_own

BAMBA, MAMBA2, MAMBA_SSM, LLAMBA = "bamba", "mamba2", "mamba_ssm", "llamba"
BAMBA_ROTARY = 0.5
NO_LIMIT = 2**20
"""Positions of a model without any: only memory ends its contexts."""


def parse(raw: dict[str, Any], where: str) -> tuple[str, DecoderConfig]:
    """The layout and the decoder's shape of a config.json already read as `raw`; absent fields have stock defaults.

    Raises BadInput naming `where` and the field, for whatever the decoder does not compute.
    """
    layout = _layout(raw)
    if layout == OWN:
        return OWN, parse_own(raw, where)
    readers = dict.fromkeys(WRITTEN, parse_written)
    readers |= {BAMBA: _bamba, MAMBA2: _mamba2, MAMBA_SSM: _mamba_ssm, LLAMBA: _llamba}
    if layout not in readers:
        known = ", ".join(map(repr, readers))
        raise BadInput(f"{where}: model_type is {layout!r}, supported are {known}, without experts")
    try:
        return layout, readers[layout](Fields(raw, where))
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from error


def _layout(raw: dict[str, Any]) -> Any:
    """`model_type`; two older layouts are known by other fields."""
    mixer = raw.get("ssm_cfg")
    if "model_type" in raw or not isinstance(mixer, dict):
        return raw.get("model_type")
    return LLAMBA if "n_v_heads" in mixer else MAMBA_SSM if mixer.get("layer") == "Mamba2" else None


def _bamba(fields: Fields) -> DecoderConfig:
    fields.only("quantization_config", None, None)
    fields.only("hidden_act", "silu", "silu")
    fields.only("attention_bias", False, False)
    fields.only("mlp_bias", False, False)
    hidden, heads = fields.integer("hidden_size", 4096), fields.integer("num_attention_heads", 32)
    head_dim = fields.integer("head_dim", hidden // heads)
    layers, listed = fields.integer("num_hidden_layers", 32), fields.raw.get("attn_layer_indices") or []
    if not isinstance(listed, list) or not all(isinstance(index, int) and 0 <= index < layers for index in listed):
        raise fields.fail("attn_layer_indices", listed, f"a list of layer numbers below {layers}")
    inner = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    factor = Fields(inner, f"{fields.where}: rope_parameters").number("partial_rotary_factor", BAMBA_ROTARY)
    # transformers sets the factor of the whole file to a half whatever it says.
    theta, scaling = parse_rope(Fields({**fields.raw, "partial_rotary_factor": factor}, fields.where), factor)
    rotary = int(head_dim * factor)
    if rotary % 2:
        raise fields.fail("partial_rotary_factor", factor, f"one that turns an even number of {head_dim} channels")
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size", 128000),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 14336),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", 8),
        head_dim=head_dim,
        layer_types=tuple(ATTENTION if index in listed else MAMBA for index in range(layers)),
        mamba=parse_mamba(fields, hidden),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.integer("max_position_embeddings", 262144),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=fields.token("bos_token_id", 1),
        eos_token_ids=parse_eos(fields),
        pad_token_id=fields.token("pad_token_id", 0),
        rotary_dim=None if rotary == head_dim else rotary,
    )


def _mamba2(fields: Fields) -> DecoderConfig:
    fields.only("quantization_config", None, None)
    fields.only("hidden_act", "silu", "silu")
    fields.only("use_bias", False, False)
    fields.flag("use_conv_bias", True)
    check_no_limit(fields)
    mamba = MambaConfig(
        n_heads=fields.integer("num_heads", 128),
        head_dim=fields.integer("head_dim", 64),
        d_state=fields.integer("state_size", 128),
        n_groups=fields.integer("n_groups", 8),
        d_conv=fields.integer("conv_kernel", 4),
        chunk_size=fields.integer("chunk_size", 256),
    )
    hidden, expand = fields.integer("hidden_size", 4096), fields.integer("expand", 2)
    if mamba.d_inner != expand * hidden:
        raise fields.fail("num_heads", mamba.n_heads, f"expand * hidden_size / head_dim = {expand * hidden}")
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size", 32768),
        layer_types=(MAMBA,) * fields.integer("num_hidden_layers", 64),
        mamba=mamba,
        rms_norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=fields.token("bos_token_id", 0),
        eos_token_ids=parse_eos(fields),
        pad_token_id=fields.token("pad_token_id", 1),
        **_without_attention(hidden, 1, mamba.head_dim),
    )


def _mamba_ssm(fields: Fields) -> DecoderConfig:
    fields.only("d_intermediate", 0, 0)
    fields.only("attn_layer_idx", [], [])
    fields.only("rms_norm", True, True)
    mixer = Fields(fields.raw["ssm_cfg"], f"{fields.where}: ssm_cfg")
    for name in ("rmsnorm", "D_has_hdim", "norm_before_gate", "bias", "conv_bias"):
        standard = name in ("rmsnorm", "conv_bias")
        mixer.only(name, standard, standard)
    hidden, width = fields.integer("d_model"), mixer.integer("headdim", 64)
    mamba = MambaConfig(
        n_heads=mixer.integer("expand", 2) * hidden // width,
        head_dim=width,
        d_state=mixer.integer("d_state", 128),
        n_groups=mixer.integer("ngroups", 1),
        d_conv=mixer.integer("d_conv", 4),
        chunk_size=mixer.integer("chunk_size", 256),
    )
    return DecoderConfig(
        vocab_size=_padded_vocabulary(fields),
        layer_types=(MAMBA,) * fields.integer("n_layer"),
        mamba=mamba,
        tie_word_embeddings=fields.flag("tie_embeddings", True),
        eos_token_ids=parse_eos(fields, 0),
        **_without_attention(hidden, 1, width),
    )


def _llamba(fields: Fields) -> DecoderConfig:
    if not all(isinstance(fields.raw.get(name), dict) for name in ("ssm_cfg", "mlp_cfg")):
        raise fields.fail("ssm_cfg", fields.raw.get("ssm_cfg"), "an object, as mlp_cfg")
    fields.only("lm_head_bias", False, False)
    fields.only("norm_epsilon", 1e-5, 1e-5)  # the layers' own is written into the model's code
    mixer, mlp = (Fields(fields.raw[name], f"{fields.where}: {name}") for name in ("ssm_cfg", "mlp_cfg"))
    mixer.only("activation", "identity", "identity")
    mixer.only("bias", False, False)
    mixer.flag("conv_bias", True)
    mlp.only("act_fn", "silu", "silu")
    mlp.only("bias", False, False)
    hidden, heads = fields.integer("d_model"), mixer.integer("n_v_heads", 32)
    mamba = MambaConfig(
        n_heads=heads,
        head_dim=mixer.integer("expand", 1) * hidden // heads,
        d_state=mixer.integer("d_state", 64),
        n_groups=mixer.integer("n_qk_heads", 32),
        d_conv=mixer.integer("d_conv", 4),
        chunk_size=mixer.integer("chunk_size", 128),
        kind=DISCRETE,
    )
    return DecoderConfig(
        vocab_size=_padded_vocabulary(fields, 8),
        layer_types=(MAMBA,) * fields.integer("n_layer", 32),
        mamba=mamba,
        tie_word_embeddings=fields.flag("tie_embeddings", False),
        bos_token_id=fields.token("bos_token_id", None),
        eos_token_ids=parse_eos(fields, None),
        pad_token_id=fields.token("pad_token_id", None),
        **_without_attention(hidden, mlp.integer("intermediate_size"), mamba.head_dim),
    )


def _padded_vocabulary(fields: Fields, default: int = 8) -> int:
    multiple = fields.integer("pad_vocab_size_multiple", default)
    return -(-fields.integer("vocab_size") // multiple) * multiple


def _without_attention(hidden: int, intermediate: int, head_dim: int) -> dict[str, Any]:
    """The fields of a decoder that only attention has a use for, such that an inert attention layer can be added.

    A model without feed-forward layers gets ones of a single channel, which adds zero.
    """
    if head_dim % 2 or hidden % head_dim:
        head_dim = hidden
    heads = {"num_heads": hidden // head_dim, "num_kv_heads": 1, "head_dim": head_dim}
    return heads | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": NO_LIMIT,
    }


def absent(name: str, raw: dict[str, Any], layout: str) -> float | None:
    """What a tensor of the decoder holds everywhere if the layout has not got it, None for one that is in the file."""
    if layout == LLAMBA:
        biased = raw["ssm_cfg"].get("conv_bias", True)
    else:
        biased = raw.get("use_conv_bias" if layout == MAMBA2 else "mamba_conv_bias", True)
    if name.endswith("conv1d.bias") and not biased:
        return 0.0
    if layout in (MAMBA2, MAMBA_SSM):
        if ".mlp." in name:
            return 0.0
        if name.endswith("post_attention_layernorm.weight"):
            return 1.0
    return None


def adapt(state: dict[str, Tensor], raw: dict[str, Any], layout: str, config: DecoderConfig) -> dict[str, Tensor]:
    """A state dict in which the multipliers and the rotary embedding of the layout have become the decoder's own."""
    if layout == OWN:
        return state
    if layout == HYBRID:
        return _without_multipliers(state, raw, config)
    if config.rotary_dim:
        order = _whole_rotation(config.head_dim, config.rotary_dim)
        for name, tensor in state.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = tensor.view(-1, config.head_dim, tensor.shape[-1])
                state[name] = heads[:, order].reshape(tensor.shape)
    return state


def _without_multipliers(state: dict[str, Tensor], raw: dict[str, Any], config: DecoderConfig) -> dict[str, Tensor]:
    """Embeddings, residual branches, scores and logits times the factors of Granite, folded into the weights."""
    embedding, residual = raw.get("embedding_multiplier", 1.0), raw.get("residual_multiplier", 1.0)
    scores = raw.get("attention_multiplier", 1.0) * config.head_dim**0.5
    # A tied head would multiply by the embedding's factor as well.
    last = raw.get("logits_scaling", 1.0) * (embedding if config.tie_word_embeddings else 1.0)
    factors = {
        "embed_tokens.weight": embedding,
        "q_proj.weight": scores,
        "q_proj.bias": scores,
        "down_proj.weight": residual,
    }
    factors |= {"o_proj.weight": residual, "out_proj.weight": residual}
    for name, tensor in state.items():
        factor = 1.0 / last if name == "norm.weight" else factors.get(name.split("mixer.")[-1].split("mlp.")[-1], 1.0)
        if abs(factor - 1.0) > 1e-6:
            state[name] = tensor.float() * factor
    return state


def _whole_rotation(head_dim: int, rotary: int) -> Tensor:
    """The order of a head's channels in which the turned pairs (i, i + rotary/2) become pairs (i, i + head_dim/2)."""
    half, still = rotary // 2, (head_dim - rotary) // 2
    channels = torch.arange(head_dim)
    first, second, rest = channels[:half], channels[half:rotary], channels[rotary:]
    return torch.cat((first, rest[:still], second, rest[still:]))
