"""Stock checkpoint tensors: how their names map to a decoder's, and the inert layer of pure students."""

from __future__ import annotations

import torch
from torch import Tensor

from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig
from thinkfast.model.foreign import BAMBA, LLAMBA, MAMBA2, MAMBA_SSM
from thinkfast.model.layout import HYBRID
from thinkfast.model.own import OWN

MIXERS = {ATTENTION: "self_attn", MAMBA: "mamba"}
STATE_SPACE = (MAMBA2, MAMBA_SSM, LLAMBA)
RENAMED = {
    BAMBA: {
        "norm.": "final_layernorm.",
        "mlp.": "feed_forward.",
        "post_attention_layernorm.": "pre_ff_layernorm.",
    },
    MAMBA2: {"embed_tokens.": "embeddings.", "norm.": "norm_f.", "input_layernorm.": "norm."},
    MAMBA_SSM: {"embed_tokens.": "embedding.", "norm.": "norm_f.", "input_layernorm.": "norm."},
    LLAMBA: {"embed_tokens.": "embedding.", "norm.": "final_layernorm."},
}
"""How other layouts call what this one calls by the names of Llama: beginnings of names, in and outside of layers."""
FUSED = "shared_mlp.input_linear.weight"
HYBRID_MLP = {
    "mlp.gate_proj.weight": (FUSED, 0),
    "mlp.up_proj.weight": (FUSED, 1),
    "mlp.down_proj.weight": ("shared_mlp.output_linear.weight", None),
}


def layout_of(config: DecoderConfig) -> str:
    """The layout a decoder is written in."""
    return HYBRID if MAMBA in config.layer_types else config.family


def output_biases(config: DecoderConfig, layout: str) -> list[str]:
    """Stock names of the biases that the hybrid layout has behind o_proj wherever queries, keys and values have one;
    the decoder has none, so they are zero."""
    if layout != HYBRID or not config.qkv_bias:
        return []
    indices = (index for index, kind in enumerate(config.layer_types) if kind == ATTENTION)
    return [f"model.layers.{index}.self_attn.o_proj.bias" for index in indices]


def stock_name(name: str, config: DecoderConfig, layout: str) -> tuple[str, int | None]:
    """The stock name of a decoder's tensor, and which half of that tensor it is (None: all of it)."""
    if name == "lm_head.weight" or layout == OWN:
        return name, None
    model = "backbone" if layout in STATE_SPACE else "model"
    if not name.startswith("layers."):
        return f"{model}.{_renamed(name, layout)}", None
    _, index, rest = name.split(".", 2)
    half = None
    if rest.startswith("mixer."):
        if layout not in STATE_SPACE:
            rest = rest.replace("mixer", MIXERS[config.layer_types[int(index)]], 1)
    elif layout == HYBRID and rest in HYBRID_MLP:
        rest, half = HYBRID_MLP[rest]
    return f"{model}.layers.{index}.{_renamed(rest, layout)}", half


def _renamed(name: str, layout: str) -> str:
    for ours, theirs in RENAMED.get(layout, {}).items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def to_stock(state: dict[str, Tensor], config: DecoderConfig, layout: str) -> dict[str, Tensor]:
    """A decoder's state dict under the names of `layout`; the hybrid one holds gate over up in one tensor."""
    stock: dict[str, Tensor] = {}
    halves: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        target, half = stock_name(name, config, layout)
        if half is None:
            stock[target] = tensor
        else:
            halves.setdefault(target, {})[half] = tensor
    for name in output_biases(config, layout):
        stock[name] = state["embed_tokens.weight"].new_zeros(config.hidden_size)
    return stock | {target: torch.cat((parts[0], parts[1])) for target, parts in halves.items()}


def stock_shapes(state: dict[str, Tensor], config: DecoderConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `to_stock` returns."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(output_biases(config, layout), (config.hidden_size,))
    for name, tensor in state.items():
        target, half = stock_name(name, config, layout)
        rows, *rest = tensor.shape
        shapes[target] = (rows if half is None else 2 * rows, *rest)
    return shapes


def from_stock(stock: dict[str, Tensor], names: list[str], config: DecoderConfig, layout: str) -> dict[str, Tensor]:
    """The inverse of `to_stock`; `names` are the keys of the decoder's state dict."""
    state = {}
    for name in names:
        target, half = stock_name(name, config, layout)
        state[name] = stock[target] if half is None else stock[target].chunk(2)[half]
    return state


def inert_layer(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of an attention layer behind the last one that adds zero: norms 1, everything else 0.

    Stock implementations cannot generate without any attention layer; this one changes no logit.
    """
    hidden, wide = config.hidden_size, config.num_heads * config.head_dim
    narrow = config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj.weight": (wide, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, wide),
        FUSED: (2 * config.intermediate_size, hidden),
        "shared_mlp.output_linear.weight": (hidden, config.intermediate_size),
    }
    prefix = f"model.layers.{config.num_layers}"
    layer = {f"{prefix}.{name}": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        layer[f"{prefix}.{name}"] = torch.ones(hidden, dtype=dtype)
    return layer


def writers_of_only_attention(config: DecoderConfig) -> tuple[str, ...]:
    """Names of the tensors through which the last layer, if it is the only attention layer, adds to the residual."""
    *before, last = config.layer_types
    if last != ATTENTION or not before or ATTENTION in before:
        return ()
    prefix = f"model.layers.{config.num_layers - 1}"
    return f"{prefix}.self_attn.o_proj.weight", f"{prefix}.shared_mlp.output_linear.weight"


def without_last_layer(stock: dict[str, Tensor], config: DecoderConfig) -> tuple[dict[str, Tensor], DecoderConfig]:
    """The stock tensors and the shape of a decoder without its last layer."""
    prefix = f"model.layers.{config.num_layers - 1}."
    kept = {name: tensor for name, tensor in stock.items() if not name.startswith(prefix)}
    return kept, config.with_layers(config.layer_types[:-1], config.mamba)
