"""Stock checkpoint layouts: what the config.json of a Hugging Face model says about a decoder.

The layouts that are written are named by their `model_type`: `llama` (also SmolLM), `mistral`, `qwen2`, `qwen3`, and
`granitemoehybrid` in its dense form (no experts). Those that are only read are in `foreign.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, MAMBA, MAMBA2, DecoderConfig, MambaConfig, RopeScaling

LLAMA, MISTRAL, QWEN2, QWEN3 = "llama", "mistral", "qwen2", "qwen3"
HYBRID = "granitemoehybrid"
CLASSES = {
    LLAMA: "LlamaForCausalLM",
    MISTRAL: "MistralForCausalLM",
    QWEN2: "Qwen2ForCausalLM",
    QWEN3: "Qwen3ForCausalLM",
    HYBRID: "GraniteMoeHybridForCausalLM",
}
WRITTEN = tuple(CLASSES)
FULL = "full_attention"
KINDS = {"mamba": MAMBA, "linear_attention": MAMBA, "attention": ATTENTION, FULL: ATTENTION}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
NO_POSITIONS = (None, "nope")


class Fields:
    """The fields of one config.json, read with a complaint that names file and field."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def fail(self, name: str, value: object, expected: str) -> BadInput:
        return BadInput(f"{self.where}: {name} is {value!r}, expected {expected}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(name, value, "a positive number")
        return float(value)

    def token(self, name: str, default: int | None) -> int | None:
        value = self.raw.get(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise self.fail(name, value, "a token id or null")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, value, "true or false")
        return value

    def only(self, name: str, default: object, supported: object) -> None:
        """Refuses every value of a field but the one the decoder computes."""
        value = self.raw.get(name, default)
        if value != supported:
            raise self.fail(name, value, f"{supported!r}: nothing else is supported")


def parse_written(fields: Fields) -> DecoderConfig:
    """The decoder's shape in one of the layouts `WRITTEN`; absent fields have stock defaults.

    Raises BadInput naming the field, for whatever the decoder does not compute, and ValueError for shapes that do not
    go together.
    """
    layout: str = fields.raw["model_type"]
    fields.only("quantization_config", None, None)
    fields.only("hidden_act", "silu", "silu")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim, shared = hidden // heads, {MISTRAL: 8, QWEN2: 32, QWEN3: 32}.get(layout, heads)
    if layout != QWEN2:
        head_dim = fields.integer("head_dim", 128 if layout == QWEN3 else head_dim)
    if head_dim % 2:
        raise fields.fail("head_dim", head_dim, "an even number, as rotary embedding asks for")
    positions, family, mamba = True, layout, None
    if layout == HYBRID:
        kinds = _parse_layer_types(fields)
        mamba = _parse_hybrid(fields, hidden) if MAMBA in kinds else None
        bias, positions = fields.flag("attention_bias", False), _parse_positions(fields)
        family = QWEN2 if bias and mamba is None else LLAMA
    else:
        kinds, bias = (ATTENTION,) * fields.integer("num_hidden_layers"), layout == QWEN2
        _check_family(fields, layout)
    theta, scaling = parse_rope(fields)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("shared_intermediate_size" if layout == HYBRID else "intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads if "num_key_value_heads" in fields.raw else shared),
        head_dim=head_dim,
        layer_types=kinds,
        mamba=mamba,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=fields.token("bos_token_id", None if layout in (QWEN2, QWEN3) else 1),
        eos_token_ids=parse_eos(fields, None if layout in (QWEN2, QWEN3) else 2),
        pad_token_id=fields.token("pad_token_id", None),
        rotary_dim=None if positions else 0,
        qkv_bias=bias,
        qk_norm=layout == QWEN3,
        family=family,
    )


def _check_family(fields: Fields, layout: str) -> None:
    """Refuses what the classes of Llama, Mistral and Qwen can and this decoder cannot."""
    if layout != QWEN2:
        fields.only("attention_bias", False, False)
    fields.only("mlp_bias", False, False)
    fields.only("rope_interleaved", False, False)
    for index, kind in enumerate(fields.raw.get("layer_types") or []):
        if kind != FULL:
            raise fields.fail(f"layer_types[{index}]", kind, f"{FULL!r}: nothing else is supported")
    if layout == MISTRAL or (layout in (QWEN2, QWEN3) and fields.flag("use_sliding_window", False)):
        window = fields.raw.get("sliding_window", 4096)
        longest = fields.integer("max_position_embeddings", 4096 * 32 if layout == MISTRAL else 32768)
        if window is not None and fields.integer("sliding_window", 4096) < longest:
            raise fields.fail(
                "sliding_window",
                window,
                f"null or at least max_position_embeddings = {longest}: a window shorter than the context is not "
                f"supported (with max_position_embeddings = {window} the model is exact)",
            )


def _parse_layer_types(fields: Fields) -> tuple[str, ...]:
    names = fields.raw.get("layer_types")
    count = fields.integer("num_hidden_layers")
    if not isinstance(names, list) or len(names) != count:
        raise fields.fail("layer_types", names, f"a list of num_hidden_layers = {count} names")
    for index, name in enumerate(names):
        if not isinstance(name, str) or name not in KINDS:
            raise fields.fail(f"layer_types[{index}]", name, f"one of {', '.join(KINDS)}")
    return tuple(KINDS[name] for name in names)


def _parse_positions(fields: Fields) -> bool:
    """Whether there is rotary embedding; checks what `adapt` reads as well."""
    value = fields.raw.get("position_embedding_type")
    if value not in (*NO_POSITIONS, "rope"):
        raise fields.fail("position_embedding_type", value, "'rope', 'nope' or null")
    for name in (*MULTIPLIERS, "attention_multiplier"):
        fields.number(name, 1.0)
    return value == "rope"


def _parse_hybrid(fields: Fields, hidden: int) -> MambaConfig:
    fields.only("num_local_experts", 8, 0)
    return parse_mamba(fields, hidden)


def parse_mamba(fields: Fields, hidden: int) -> MambaConfig:
    """The `mamba_*` fields that GraniteMoeHybrid and Bamba share."""
    fields.only("mamba_proj_bias", False, False)
    fields.flag("mamba_conv_bias", True)
    check_no_limit(fields)
    heads = fields.integer("mamba_n_heads", 128)
    inner = fields.integer("mamba_expand", 2) * hidden
    auto = fields.raw.get("mamba_d_head", "auto") == "auto"
    width = inner // heads if auto else fields.integer("mamba_d_head")
    if heads * width != inner:
        raise fields.fail("mamba_d_head", width, f"mamba_expand * hidden_size / mamba_n_heads = {inner / heads:g}")
    return MambaConfig(
        n_heads=heads,
        head_dim=width,
        d_state=fields.integer("mamba_d_state", 256),
        n_groups=fields.integer("mamba_n_groups", 1),
        d_conv=fields.integer("mamba_d_conv", 4),
        chunk_size=fields.integer("mamba_chunk_size", 256),
    )


def check_no_limit(fields: Fields) -> None:
    """Refuses a limit on the time step: the stock classes do not apply it in every path."""
    limit = fields.raw.get("time_step_limit")
    if limit is not None and limit not in ([0, math.inf], [0, {"__float__": "Infinity"}]):
        raise fields.fail("time_step_limit", limit, "no limit")


def parse_rope(fields: Fields, partial: float = 1.0) -> tuple[float, RopeScaling | None]:
    """Base and scaling; `rope_scaling` goes before `rope_parameters` where both are written, as in transformers."""
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    raw = fields.raw.get(name) or {}
    if not isinstance(raw, dict):
        raise fields.fail(name, raw, "an object or null")
    inner = Fields(raw, f"{fields.where}: {name}")
    theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0))
    inner.only("partial_rotary_factor", partial, partial)
    fields.only("partial_rotary_factor", partial, partial)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise inner.fail("rope_type", kind, "'default' or 'llama3'")
    if "original_max_position_embeddings" not in raw:
        raise inner.fail("original_max_position_embeddings", None, "a positive integer")
    return theta, RopeScaling(
        factor=inner.number("factor", math.nan),
        low_freq_factor=inner.number("low_freq_factor", math.nan),
        high_freq_factor=inner.number("high_freq_factor", math.nan),
        original_max_position_embeddings=inner.integer("original_max_position_embeddings"),
    )


def parse_eos(fields: Fields, default: int | None = 2) -> tuple[int, ...]:
    """The ids that end a text."""
    value = fields.raw.get("eos_token_id", default)
    values = [] if value is None else value if isinstance(value, list) else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise fields.fail("eos_token_id", value, "a token id, a list of them, or null")
    return tuple(values)


def check_stock(config: DecoderConfig, where: str = "") -> None:
    """Raises BadInput for a mixer that neither dense GraniteMoeHybrid nor its counterpart in llama.cpp has; `where`
    begins the message."""
    if config.qk_norm:
        raise BadInput(
            f"{where}the attention layers norm queries and keys, which no layout of a hybrid model can express: "
            "convert every layer, or take a teacher without QK norm"
        )
    if config.mamba is not None and config.mamba.kind != MAMBA2:
        raise BadInput(
            f"{where}the layers are {config.mamba.title}, which no stock layout can express: "
            "distil the teacher into Mamba-2 layers"
        )
    if config.rotary_dim not in (None, 0, config.head_dim):
        raise BadInput(
            f"{where}rotary embedding turns {config.rotary_dim} of {config.head_dim} channels, which no layout that is "
            "written can express: all or none"
        )


_OWN_FIELDS: dict[str, dict[str, Any]] = {
    LLAMA: {"attention_bias": False, "mlp_bias": False},
    MISTRAL: {"sliding_window": None},
    QWEN2: {"use_sliding_window": False, "sliding_window": None},
    QWEN3: {"use_sliding_window": False, "sliding_window": None, "attention_bias": False},
}


def _check_written(config: DecoderConfig, layout: str) -> None:
    """Raises BadInput for a decoder of attention layers whose family cannot say what it computes."""
    if config.hidden_size % config.num_heads and layout == LLAMA:
        raise BadInput(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
    if layout == QWEN2 and config.head_dim * config.num_heads != config.hidden_size:
        raise BadInput(f"head_dim is {config.head_dim}, but Qwen2 has hidden_size / num_heads")
    if (config.qkv_bias, config.qk_norm) != (layout == QWEN2, layout == QWEN3):
        raise BadInput(f"the layout {layout!r} cannot express qkv_bias {config.qkv_bias} with qk_norm {config.qk_norm}")


def dump_config(config: DecoderConfig, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a decoder, in the spelling that transformers 4.57 and 5, vLLM, SGLang and llama.cpp read.

    Raises BadInput for a shape that the stock class refuses.
    """
    theta = {"rope_theta": config.rope_theta}
    scaling = None
    if config.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_position_embeddings,
        }
    eos = list(config.eos_token_ids)
    name = str(dtype).removeprefix("torch.")
    raw: dict[str, Any] = {
        "model_type": layout,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), **theta},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "dtype": name,
        "torch_dtype": name,
    }
    if layout != HYBRID:
        _check_written(config, layout)
        return raw | {"architectures": [CLASSES[layout]], **_OWN_FIELDS[layout]}
    if config.mamba is None:
        raise ValueError("the configuration has no mamba shape")
    check_stock(config)
    if config.mamba.d_inner % config.hidden_size:
        raise BadInput(
            f"mamba n_heads * head_dim = {config.mamba.d_inner} is not a multiple of hidden_size {config.hidden_size}"
        )
    return raw | {
        "architectures": [CLASSES[HYBRID]],
        "attention_bias": config.qkv_bias,
        "layer_types": list(config.layer_types),
        "shared_intermediate_size": config.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": None if config.rotary_dim == 0 else "rope",
        "attention_multiplier": config.head_dim**-0.5,
        **dict.fromkeys(MULTIPLIERS, 1.0),
        "mamba_n_heads": config.mamba.n_heads,
        "mamba_d_head": config.mamba.head_dim,
        "mamba_expand": config.mamba.d_inner // config.hidden_size,
        "mamba_d_state": config.mamba.d_state,
        "mamba_n_groups": config.mamba.n_groups,
        "mamba_d_conv": config.mamba.d_conv,
        "mamba_chunk_size": config.mamba.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }
