"""Any set of attention layers from one student that has none: its mixers were aligned once, layer by layer, so that
each of them stands for its teacher layer whatever the others are.
"""

from __future__ import annotations

import torch

from thinkfast.errors import BadInput
from thinkfast.model.config import MAMBA
from thinkfast.model.decoder import Decoder
from thinkfast.student.plan import LayerPlan


def assemble(teacher: Decoder, base: Decoder, attention: tuple[int, ...]) -> Decoder:
    """The teacher with the mixers of `base` in every layer outside `attention`, in eval mode; neither is changed.

    Raises BadInput when a layer is out of range or named twice, or when `base` was made from another teacher, by shape
    or by the tensors that conversion copies bit for bit, or lacks a mixer that is needed.
    """
    shape = base.config.mamba
    if shape is None:
        raise BadInput("the base has only attention layers, expected one with a mixer for every layer")
    groups = shape.n_groups
    config = LayerPlan(attention, "random", groups, shape.kind).student_config(teacher.config)
    if config.mamba is not None and config.mamba != shape:
        raise BadInput(f"the base has mixers of shape {shape}, this teacher asks for {config.mamba}")
    for index, kind in enumerate(config.layer_types):
        if index >= base.config.num_layers or (kind == MAMBA and base.config.layer_types[index] != MAMBA):
            raise BadInput(f"the base has no mixer for layer {index}")
    theirs, ours = base.state_dict(), teacher.state_dict()
    for name, tensor in ours.items():
        copied = ".mixer." not in name
        if copied and (name not in theirs or not torch.equal(theirs[name], tensor)):
            raise BadInput(f"the base was made from another teacher or trained end to end: {name} differs")
    with torch.random.fork_rng(devices=[]):
        student = Decoder(config).to(teacher.embed_tokens.weight.device, teacher.embed_tokens.weight.dtype)
    new = tuple(f"layers.{index}.mixer." for index, kind in enumerate(config.layer_types) if kind == MAMBA)
    student.load_state_dict(
        {name: theirs[name] if name.startswith(new) else ours[name] for name in student.state_dict()}
    )
    return student.eval()
