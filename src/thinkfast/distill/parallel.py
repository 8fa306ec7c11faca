"""A run on several processes: who takes which batches, weights in shards, and states that any number of them reads.

`torchrun` starts the processes. Student and teacher are sharded by `fully_shard` (FSDP2), each mixer and each
feed-forward layer a unit of its own, so that every stage may call them one by one; what is left (embeddings, norms,
head) is gathered once a batch by the pair that holds both models. A step takes the same batches whatever the number of
processes, and its loss is divided by what is valid in all of them, so the number changes a run by rounding alone.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinkfast import records
from thinkfast.distill.state import Counters, Identity, check_identity, counters_from, load_state, save_state
from thinkfast.errors import BadInput
from thinkfast.model.decoder import Block, Decoder
from thinkfast.ranks import Team

STEP, FACTS = "step-", "state.json"
CALLED = ("matrix", "added")
"""Methods of the parts of a layer that are called beside `forward`; their weights must be whole for them as well."""


class Pair(nn.Module):
    """Teacher and student under one root: while it runs, the weights outside of the layers are whole."""

    def __init__(self, teacher: Decoder, student: Decoder) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def shard(team: Team, teacher: Decoder, student: Decoder, dtype: torch.dtype = torch.float32) -> None:
    """Cuts both models into the team's shards, in place; `dtype` is what they compute in. The student's own weights,
    gradients and optimiser stay in float32 and are cast as they are gathered; the teacher is held in `dtype`.

    Parameters are other objects afterwards: make the optimiser behind it.
    """
    if not team.together:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    half = dtype != torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32) if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(torch.device(team.device).type, (team.size,))
    team.pair = Pair(teacher.requires_grad_(False).to(dtype), student)
    for model in (teacher, student):
        for block in model.layers:
            if isinstance(block, Block):
                for part in (block.mixer, block.mlp):
                    fully_shard(part, mesh=mesh, mp_policy=policy)
                    for name in CALLED:
                        if hasattr(part, name):
                            register_fsdp_forward_method(part, name)
    # Without this the root stays whole behind an evaluation, and an optimiser made then would hold the wrong tensors.
    fully_shard(team.pair, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in team.pair.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the count of all processes already: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def norm_of(norm: Tensor) -> float:
    """A gradient norm as a number; that of shards lies on all processes."""
    from torch.distributed.tensor import DTensor

    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def save(
    team: Team, path: Path, identity: Identity, counters: Counters, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Saves a training state: alone as the file `path`, in a team as a directory beside it, a part by each process.

    Killed at any moment it leaves the state before or the new one.
    """
    if not team.together:
        save_state(path, identity, counters, model, optimizer)
        shutil.rmtree(folder(path), ignore_errors=True)
        return
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    place = folder(path) / f"{STEP}{counters.step:09d}"
    staging = place.with_name(f".{place.name}")
    if team.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    team.wait()
    weights, moments = get_state_dict(model, optimizer)
    document = {"model": weights, "optimizer": moments, "random": torch.random.get_rng_state()}
    save_parts(document, checkpoint_id=staging)
    if team.rank == 0:
        records.write_json(staging / FACTS, {"identity": dict(identity), "counters": asdict(counters)})
        shutil.rmtree(place, ignore_errors=True)
        staging.rename(place)
        for old in folder(path).glob(f"*{STEP}*"):
            if old != place:
                shutil.rmtree(old)
        path.unlink(missing_ok=True)
    team.wait()


def load(
    team: Team, path: Path, identity: Identity, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Counters | None:
    """Puts the last saved state into `model` and `optimizer`, whatever number of processes saved it; None where nothing
    was saved. Raises BadInput as `load_state` does, and in a team for a state that was saved without one."""
    saved = sorted(folder(path).glob(f"{STEP}*"))
    if not saved or (not team.together and path.exists()):
        if team.together and path.exists():
            raise BadInput(f"{path}: was saved without torchrun; go on without it, or remove the file to begin anew")
        return load_state(path, identity, model, optimizer)
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    place = saved[-1]
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        counters = counters_from(facts["counters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{place}: not a training state ({type(error).__name__}); remove it to begin anew") from None
    check_identity(place, facts["identity"], identity)
    weights, moments = get_state_dict(model, optimizer)
    random = torch.random.get_rng_state()
    with warnings.catch_warnings():
        if not team.together:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load_parts({"model": weights, "optimizer": moments, "random": random}, checkpoint_id=place)
        except (CheckpointException, RuntimeError, ValueError) as error:
            raise BadInput(f"{place}: belongs to another model ({str(error).splitlines()[0]})") from None
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    torch.random.set_rng_state(random)
    return counters


def folder(path: Path) -> Path:
    """Where a team keeps what one process keeps in the file `path`."""
    return path.with_name(f"{path.name}.d")


def whole(team: Team, student: Decoder) -> Decoder | None:
    """The student with all of its weights, on the CPU in float32, gathered on the first process; None on the others.

    Alone it is the student itself.
    """
    gathered = _gathered(team, student, first_alone=True)
    return None if team.rank else gathered


def whole_everywhere(team: Team, student: Decoder) -> Decoder:
    """As `whole`, on every process."""
    return _gathered(team, student, first_alone=False)


def _gathered(team: Team, student: Decoder, first_alone: bool) -> Decoder:
    if not team.together:
        return student
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # Weights that are offloaded to the CPU reach the first process alone.
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=first_alone))
    gathered = Decoder(student.config)
    if weights:
        gathered.load_state_dict(weights)
    return gathered.eval()
