"""Logits of a Llamba checkpoint by the public implementation: `cartesia-mlx`, on the CPU build of `mlx`.

`python tests/model/llamba_mlx.py MODEL.npz OUT.npy`, in an environment of its own (`make llamba`). The kernels of
`cartesia-metal` exist for Apple's GPUs alone; of them a whole prompt needs the convolution, which is written here.
"""

import sys
from types import ModuleType

import mlx.core as mx
import numpy as np


def convolution(
    x: mx.array, weight: mx.array, bias: mx.array, past: mx.array, swish: bool
) -> tuple[mx.array, mx.array]:
    """Causal, by channel: x (B, L, C), weight (C, K), past (B, C, K - 1); returns y (B, L, C) and the new past."""
    assert not swish
    width, length = weight.shape[1], x.shape[1]
    padded = mx.concatenate([past.swapaxes(1, 2).astype(x.dtype), x], axis=1)
    y = sum(padded[:, tap : tap + length] * weight[:, tap] for tap in range(width))
    return y + bias, padded[:, length:].swapaxes(1, 2)


def metal() -> ModuleType:
    """A `cartesia_metal` with the one kernel; the others are names that cannot be called."""
    module = ModuleType("cartesia_metal")
    for name in ("conv1d_update", "ssd_update", "ssd_update_no_z", "conv1d_swish_forward", "conv1d_swish_update"):
        setattr(module, name, None)
    module.conv1d_forward = convolution
    return module


def main(source: str, out: str) -> None:
    sys.modules["cartesia_metal"] = metal()
    from cartesia_mlx.layers.ffn import SwiGLU
    from cartesia_mlx.layers.residual_block import ResidualBlock
    from cartesia_mlx.layers.sequence_model import SequenceModel
    from cartesia_mlx.layers.ssd.llamba_ssd import LlambaSSD
    from cartesia_mlx.utils.configure import sub_cfg

    tensors = {name: mx.array(values) for name, values in np.load(source).items()}
    hidden = tensors["backbone.embedding.weight"].shape[1]
    heads = tensors["backbone.layers.0.mixer.D"].shape[0]
    inner = tensors["backbone.layers.0.mixer.z_bias"].shape[0]
    state = (tensors["backbone.layers.0.mixer.conv1d.weight"].shape[0] - inner) // (2 * heads)
    wide = tensors["backbone.layers.0.mlp.up_proj.weight"].shape[0]
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("backbone.layers."))
    mixer = sub_cfg(LlambaSSD.base_cfg, d_model=hidden, expand=inner // hidden, d_state=state, n_heads=heads)
    mlp = sub_cfg(SwiGLU.base_cfg, d_model=hidden, expand=wide / hidden, norm=None, activation="swish")
    blocks = [
        sub_cfg(ResidualBlock.base_cfg, d_model=hidden, layer=mixer),
        sub_cfg(ResidualBlock.base_cfg, d_model=hidden, layer=mlp, stateful=False),
    ]
    model = SequenceModel(sub_cfg(SequenceModel.base_cfg, d_model=hidden, n_layer_repeats=depth, unique_layers=blocks))
    weights = [("norm.weight", tensors["backbone.final_layernorm.weight"])]
    for index in range(depth):
        part = {name.split(".", 3)[3]: values for name, values in tensors.items() if f"layers.{index}." in name}
        first, second = f"layers.{2 * index}", f"layers.{2 * index + 1}"
        weights += [
            (f"{first}.norm.weight", part["input_layernorm.weight"]),
            (f"{first}.layer.in_proj.weight", part["mixer.in_proj.weight"]),
            (f"{first}.layer.out_proj.weight", part["mixer.out_proj.weight"]),
            (f"{first}.layer.conv_weight", part["mixer.conv1d.weight"].squeeze(1)),
            (f"{first}.layer.conv_bias", part["mixer.conv1d.bias"]),
            (f"{first}.layer.z_bias", part["mixer.z_bias"]),
            (f"{first}.layer.D", part["mixer.D"]),
            (f"{second}.norm.weight", part["post_attention_layernorm.weight"]),
            (f"{second}.layer.in_proj.weight", part["mlp.gate_proj.weight"]),
            (f"{second}.layer.gate_proj.weight", part["mlp.up_proj.weight"]),
            (f"{second}.layer.out_proj.weight", part["mlp.down_proj.weight"]),
        ]
    model.load_weights(weights, strict=True)
    states, _ = model(tensors["backbone.embedding.weight"][tensors["ids"]])
    np.save(out, np.array(states @ tensors["lm_head.weight"].T))


if __name__ == "__main__":
    main(*sys.argv[1:])
