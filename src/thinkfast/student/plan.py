"""Which layers of a teacher stay attention, what every tensor of the student comes from, and both as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, MAMBA, MAMBA1, MAMBA2, DecoderConfig, MambaConfig
from thinkfast.model.mixer import COPIED, INITIALISED, NEW, Part
from thinkfast.model.mixers import MIXERS

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
    """Layers that stay attention; all others get a mixer with a state, of the kind `mixer`.

    `init` "attention" takes the new mixers from the teacher's projections, "random" starts them afresh. `n_groups` is
    the number of B and C groups, by default one for each query head (of Mamba-1 one for each key/value head).
    """

    attention: tuple[int, ...] = ()
    init: str = "attention"
    n_groups: int | None = None
    mixer: str = MAMBA2

    def student_config(self, teacher: DecoderConfig) -> DecoderConfig:
        """The student's shape: one Mamba head a query head, head_dim = d_state = the teacher's head_dim.

        Raises BadInput when a layer is no int, out of range or named twice, the teacher is not all attention, or the
        mixer is unknown or cannot be built (Mamba-2: or written as a stock checkpoint).
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
        if self.mixer not in MIXERS:
            raise BadInput(f"mixer is {self.mixer!r}, expected one of {', '.join(MIXERS)}")
        if self.mixer == MAMBA2 and teacher.qk_norm and 0 < len(self.attention) < layers:
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
        shape = MIXERS[self.mixer].shape_of(teacher, self.n_groups)
        if self.mixer != MAMBA1 and self.init == "attention" and shape.n_groups != shape.n_heads:
            raise BadInput(
                f"n_groups is {shape.n_groups}, but init 'attention' needs one group for each of the "
                f"{shape.n_heads} heads"
            )
        return shape


def every(num_layers: int, stride: int) -> tuple[int, ...]:
    """One attention layer in `stride`, from layer stride // 2 on: every(4, 2) is (1, 3). Raises BadInput below 1."""
    if stride < 1:
        raise BadInput(f"stride is {stride}, expected at least 1")
    return tuple(range(stride // 2, num_layers, stride))


def uniform(num_layers: int, keep: int) -> tuple[int, ...]:
    """`keep` layers spread evenly: the middle ones of `keep` equal stretches, rounded down."""
    if not 0 <= keep <= num_layers:
        raise BadInput(f"keep is {keep}, the teacher has {num_layers} layers")
    return tuple((2 * place + 1) * num_layers // (2 * keep) for place in range(keep))


def ranked_layers(ranking: Any, keep: int, where: str) -> tuple[int, ...]:
    """The layers that a document of `thinkfast rank-layers` chooses for `keep` attention layers, in ascending order.

    Raises BadInput naming `where` and the field when it is no such document or chooses no set of that size.
    """
    choices = ranking.get("choices") if isinstance(ranking, dict) else None
    if not isinstance(choices, dict):
        raise BadInput(f"{where}: choices is missing, expected the document of thinkfast rank-layers")
    layers = choices.get(str(keep))
    if not isinstance(layers, list) or len(layers) != keep or not all(isinstance(layer, int) for layer in layers):
        raise BadInput(f"{where}: choices has no {keep} layers, expected keep among {', '.join(choices)}")
    return tuple(sorted(layers))


_KEPT = ("q_proj", "k_proj", "v_proj", "o_proj")
_SHARED = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)


def _sizes(config: DecoderConfig) -> dict[str, int]:
    """Numbers in each tensor of a layer, those of attention without their prefix."""
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    sizes = {name: hidden * config.intermediate_size for name in _SHARED if name.startswith("mlp.")}
    sizes |= {name: hidden for name in _SHARED if not name.startswith("mlp.")}
    sizes |= {"q_proj.weight": hidden * width, "o_proj.weight": hidden * width}
    sizes |= {"k_proj.weight": hidden * kv_width, "v_proj.weight": hidden * kv_width}
    sizes |= {"q_proj.bias": width, "k_proj.bias": kv_width, "v_proj.bias": kv_width}
    sizes |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), config.head_dim)
    return sizes


def _told(parts: dict[str, Part], teacher: DecoderConfig) -> dict[str, Part]:
    """The parts of a mixer with what a bias or a norm of the teacher's queries and keys adds to them."""
    found = dict(parts)
    if teacher.qkv_bias and "conv1d.bias" in found:
        found["conv1d.bias"] = (found["conv1d.bias"][0], INITIALISED, "biases of the projections")
    if teacher.qk_norm:
        for name, (size, _, source) in parts.items():
            if source in ("q_proj", "k_proj"):
                found[name] = (size, INITIALISED, f"{source}, {source[0]}_norm")
    return found


def plan_document(plan: LayerPlan, teacher: DecoderConfig, calibrated: bool) -> PlanDocument:
    """What `convert` does with this plan, tensor by tensor: copied bit for bit (rows repeated where query heads share a
    key/value head), initialised from something of the teacher, or new. `calibrated` says whether `convert` gets
    calibration tokens. Raises BadInput as `student_config`."""
    config = plan.student_config(teacher)
    sizes = _sizes(config)
    counts = {COPIED: 0, INITIALISED: 0, NEW: 0}
    layers: list[LayerOrigin] = []
    for index, kind in enumerate(config.layer_types):
        if kind == ATTENTION:
            kept = [f"{name}.weight" for name in _KEPT]
            kept += [f"{name}.bias" for name in _KEPT[:3] if config.qkv_bias]
            kept += [f"{name}.weight" for name in ("q_norm", "k_norm") if config.qk_norm]
            parts = {name: (sizes[name], COPIED, name.split(".")[0]) for name in kept}
        else:
            parts = _told(MIXERS[plan.mixer].parts(config, calibrated), teacher)
            if plan.init == "random":
                parts = {name: (size, NEW, "") for name, (size, _, _) in parts.items()}
        origins = {name: (f"mixer.{name}", how, source) for name, (_, how, source) in parts.items()}
        origins |= {name: (name, COPIED, name.removesuffix(".weight")) for name in _SHARED}
        for name, (_, how, _) in origins.items():
            counts[how] += parts[name][0] if name in parts else sizes[name]
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
