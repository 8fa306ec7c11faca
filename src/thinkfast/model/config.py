"""The shape of a decoder: one frozen record for teacher and student."""

from __future__ import annotations

from dataclasses import dataclass, replace

ATTENTION = "attention"
MAMBA = "mamba"
MAMBA2, DISCRETE, MAMBA1 = "mamba2", "discrete", "mamba1"
TITLES = {MAMBA2: "Mamba-2", DISCRETE: "Discrete Mamba-2", MAMBA1: "Mamba-1"}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class MambaConfig:
    """The shape of a mixer with a state; `kind` says which one, see `thinkfast.model.mixers`.

    Of Mamba-2 as GraniteMoeHybrid defines it, unless said otherwise there: d_inner = n_heads * head_dim.
    """

    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int
    d_conv: int = 4
    chunk_size: int = 64
    kind: str = MAMBA2

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels that pass through the convolution: x, B and C; of Mamba-1 x alone."""
        return self.d_inner if self.kind == MAMBA1 else self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def title(self) -> str:
        """What people call the mixer."""
        return TITLES[self.kind]

    @property
    def in_proj_rows(self) -> int:
        """Rows of in_proj: z, x, B, C, dt. Mamba-1 has a projection for each."""
        return self.d_inner + self.conv_dim + self.n_heads


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that fixes a decoder's tensors and arithmetic. `layer_types` has one entry a layer.

    `rotary_dim`: channels of a head that rotary embedding turns, by default all; 0 for no positions at all.
    `qkv_bias`: queries, keys and values have a bias (Qwen2); `qk_norm`: queries and keys are normed head by head before
    rotary embedding (Qwen3). `family`: the stock layout in which a decoder without Mamba layers is written.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    mamba: MambaConfig | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    rotary_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    family: str = "llama"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        for index, kind in enumerate(self.layer_types):
            if kind not in (ATTENTION, MAMBA):
                raise ValueError(f"layer_types[{index}] is {kind!r}, expected {ATTENTION!r} or {MAMBA!r}")
        if MAMBA in self.layer_types and self.mamba is None:
            raise ValueError("layer_types names mamba layers but there is no mamba shape")
        if self.mamba is not None and self.mamba.n_heads % self.mamba.n_groups:
            raise ValueError(f"mamba n_heads {self.mamba.n_heads} is not a multiple of n_groups {self.mamba.n_groups}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def with_layers(self, layer_types: tuple[str, ...], mamba: MambaConfig | None) -> DecoderConfig:
        """The same decoder with other mixers. One without attention has no bias or norm there; one with Mamba layers is
        of no family."""
        attends = ATTENTION in layer_types
        return replace(
            self,
            layer_types=layer_types,
            mamba=mamba,
            qkv_bias=self.qkv_bias and attends,
            qk_norm=self.qk_norm and attends,
            family="llama" if MAMBA in layer_types else self.family,
        )
