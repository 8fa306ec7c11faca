"""Which layers of a teacher stay attention, what every tensor of the student comes from, and both as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, MAMBA, DecoderConfig, MambaConfig

COPIED, INITIALISED, NEW = "copied", "initialised", "new"
INITS = ("attention", "random")


class TensorOrigin(TypedDict):
    """A tensor of the student (rows of a fused projection count as one), how it is made, and from what."""

    name: str
    how: str
    source: str


class LayerOrigin(TypedDict):
    """A layer: what its mixer was and is, and where its tensors come from."""

    index: int
    teacher: str
    student: str
    tensors: list[TensorOrigin]


class PlanDocument(TypedDict):
    """The document of plan.json; `tensors` are those outside the layers, `parameters` counts numbers by `how`."""

    layers: list[LayerOrigin]
    tensors: list[TensorOrigin]
    parameters: dict[str, int]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Layers that stay attention; all others become Mamba-2.

    `init` "attention" takes the new mixers from the teacher's projections, "random" starts them afresh. `n_groups` is
    the number of B and C groups, by default one for each query head.
    """

    attention: tuple[int, ...] = ()
    init: str = "attention"
    n_groups: int | None = None

    def student_config(self, teacher: DecoderConfig) -> DecoderConfig:
        """The student's shape: one Mamba head a query head, head_dim = d_state = the teacher's head_dim.

        Raises BadInput when a layer is no int, out of range or named twice, the teacher is not all attention, or the
        mixer cannot be built or written as a stock checkpoint.
        """
        layers = teacher.num_layers
        for index in self.attention:
            if isinstance(index, bool) or not isinstance(index, int):
                raise BadInput(f"attention layers: {index!r} is not a layer number")
            if not 0 <= index < layers:
                raise BadInput(f"attention layers: {index} is out of range, the teacher has layers 0..{layers - 1}")
            if self.attention.count(index) > 1:
                raise BadInput(f"attention layers: {index} is named twice")
        if self.init not in INITS:
            raise BadInput(f"init is {self.init!r}, expected one of {', '.join(INITS)}")
        if teacher.qk_norm and 0 < len(self.attention) < layers:
            raise BadInput(
                f"attention layers: {self.attention[0]} would stay, but the teacher norms queries and keys (QK norm), "
                "which no layout of a hybrid student can express: convert every layer, or take another teacher"
            )
        if MAMBA in teacher.layer_types:
            raise BadInput(
                "the teacher has mamba layers; only a teacher with attention in every layer can be converted"
            )
        kinds = tuple(ATTENTION if index in self.attention else MAMBA for index in range(layers))
        if MAMBA not in kinds:
            return teacher.with_layers(kinds, None)
        return teacher.with_layers(kinds, self._mamba_config(teacher))

    def _mamba_config(self, teacher: DecoderConfig) -> MambaConfig:
        heads = teacher.num_heads
        groups = heads if self.n_groups is None else self.n_groups
        if groups < 1 or heads % groups:
            raise BadInput(f"n_groups is {groups}, expected a divisor of the {heads} heads")
        if self.init == "attention" and groups != heads:
            raise BadInput(f"n_groups is {groups}, but init 'attention' needs one group for each of the {heads} heads")
        if heads * teacher.head_dim % teacher.hidden_size:
            raise BadInput(
                f"{heads} heads of {teacher.head_dim} are no multiple of hidden_size {teacher.hidden_size}; "
                "the stock layout of a student needs a whole expansion factor"
            )
        return MambaConfig(heads, teacher.head_dim, teacher.head_dim, groups, chunk_size=teacher.head_dim)


def every(num_layers: int, stride: int) -> tuple[int, ...]:
    """One attention layer in `stride`, from layer stride // 2 on: every(4, 2) is (1, 3). Raises BadInput below 1."""
    if stride < 1:
        raise BadInput(f"stride is {stride}, expected at least 1")
    return tuple(range(stride // 2, num_layers, stride))


_KEPT = ("q_proj", "k_proj", "v_proj", "o_proj")
_SHARED = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)


_MIXER_PARTS = (
    "in_proj.weight[z]",
    "in_proj.weight[x]",
    "in_proj.weight[B]",
    "in_proj.weight[C]",
    "in_proj.weight[dt]",
    "conv1d.weight",
    "conv1d.bias",
    "A_log",
    "D",
    "dt_bias",
    "norm.weight",
    "out_proj.weight",
)


def _mixer_origins(init: str, calibrated: bool, teacher: DecoderConfig) -> dict[str, tuple[str, str]]:
    """How and from what each part of a new mixer is made."""
    parts = dict.fromkeys(_MIXER_PARTS, (NEW, ""))
    if init == "random":
        return parts
    if teacher.qkv_bias:
        parts |= {"conv1d.bias": (INITIALISED, "biases of q_proj, k_proj, v_proj")}
    if teacher.qk_norm:
        parts |= {"in_proj.weight[B]": (INITIALISED, "k_proj, k_norm")}
    return {
        "in_proj.weight[B]": (COPIED, "k_proj"),
        **parts,
        "in_proj.weight[z]": (INITIALISED, "layer inputs, least squares") if calibrated else (NEW, ""),
        "in_proj.weight[x]": (COPIED, "v_proj"),
        "in_proj.weight[C]": (INITIALISED, "q_proj"),
        "norm.weight": (INITIALISED, "attention output, least squares" if calibrated else "v_proj"),
        "out_proj.weight": (COPIED, "o_proj"),
    }


def _sizes(config: DecoderConfig) -> dict[str, int]:
    """Numbers in each tensor of a layer, mixer parts without their prefix."""
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    sizes = {name: hidden * config.intermediate_size for name in _SHARED if name.startswith("mlp.")}
    sizes |= {name: hidden for name in _SHARED if not name.startswith("mlp.")}
    sizes |= {"q_proj.weight": hidden * width, "o_proj.weight": hidden * width}
    sizes |= {"k_proj.weight": hidden * kv_width, "v_proj.weight": hidden * kv_width}
    sizes |= {"q_proj.bias": width, "k_proj.bias": kv_width, "v_proj.bias": kv_width}
    sizes |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), config.head_dim)
    mamba = config.mamba
    if mamba is not None:
        rows = {"z": mamba.d_inner, "x": mamba.d_inner, "dt": mamba.n_heads}
        rows |= dict.fromkeys(("B", "C"), mamba.n_groups * mamba.d_state)
        sizes |= {f"in_proj.weight[{part}]": count * hidden for part, count in rows.items()}
        sizes |= {"conv1d.weight": mamba.conv_dim * mamba.d_conv, "conv1d.bias": mamba.conv_dim}
        sizes |= dict.fromkeys(("A_log", "D", "dt_bias"), mamba.n_heads)
        sizes |= {"norm.weight": mamba.d_inner, "out_proj.weight": mamba.d_inner * hidden}
    return sizes


def plan_document(plan: LayerPlan, teacher: DecoderConfig, calibrated: bool) -> PlanDocument:
    """What `convert` does with this plan, tensor by tensor: copied bit for bit (rows repeated where query heads share a
    key/value head), initialised from something of the teacher, or new. `calibrated` says whether `convert` gets
    calibration tokens. Raises BadInput as `student_config`."""
    config = plan.student_config(teacher)
    sizes = _sizes(config)
    counts = {COPIED: 0, INITIALISED: 0, NEW: 0}
    layers: list[LayerOrigin] = []
    for index, kind in enumerate(config.layer_types):
        parts: dict[str, tuple[str, str]]
        if kind == ATTENTION:
            parts = {f"{name}.weight": (COPIED, name) for name in _KEPT}
            if config.qkv_bias:
                parts |= {f"{name}.bias": (COPIED, name) for name in _KEPT[:3]}
            if config.qk_norm:
                parts |= {f"{name}.weight": (COPIED, name) for name in ("q_norm", "k_norm")}
        else:
            parts = _mixer_origins(plan.init, calibrated, teacher)
        origins = {name: (f"mixer.{name}", how, source) for name, (how, source) in parts.items()}
        origins |= {name: (name, COPIED, name.removesuffix(".weight")) for name in _SHARED}
        for name, (_, how, _) in origins.items():
            counts[how] += sizes[name]
        tensors: list[TensorOrigin] = [
            {"name": f"layers.{index}.{name}", "how": how, "source": source} for name, how, source in origins.values()
        ]
        layers.append({"index": index, "teacher": teacher.layer_types[index], "student": kind, "tensors": tensors})
    outside = {"embed_tokens": config.vocab_size * config.hidden_size, "norm": config.hidden_size}
    if not config.tie_word_embeddings:
        outside["lm_head"] = config.vocab_size * config.hidden_size
    counts[COPIED] += sum(outside.values())
    rest: list[TensorOrigin] = [{"name": f"{name}.weight", "how": COPIED, "source": name} for name in outside]
    return {"layers": layers, "tensors": rest, "parameters": counts}


def render_plan(document: PlanDocument) -> str:
    """The plan as plain text: one line a layer with what is not simply copied, then the parameter counts."""
    lines = ["layer  teacher    student    tensors"]
    for layer in document["layers"]:
        made = [_describe(tensor) for tensor in layer["tensors"] if tensor["how"] != COPIED]
        copied = len(layer["tensors"]) - len(made)
        told: Sequence[str] = [f"{copied} copied", *made]
        lines.append(f"{layer['index']:>5}  {layer['teacher']:<9}  {layer['student']:<9}  {'; '.join(told)}")
    counted = ", ".join(f"{count:,} {how}" for how, count in document["parameters"].items())
    return "\n".join([*lines, f"parameters: {counted}"])


def _describe(tensor: TensorOrigin) -> str:
    name = tensor["name"].split(".mixer.")[-1].replace("in_proj.weight", "in_proj").removesuffix(".weight")
    return f"{name} from {tensor['source']}" if tensor["source"] else f"{name} new"
